"""`jointq recipes`: what comes with jointq, what each recipe is for and what it needs."""

import argparse

from jointq_cli.cli import config_files as resources


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("jointq recipes", description="List the recipes, or show one in full.")
    words = parser.add_subparsers(dest="word", metavar="")
    show = words.add_parser("show", help="print the whole composed config of a recipe")
    show.add_argument("name", help="a recipe's name")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    parsed = parser.parse_args(arguments)
    if parsed.word == "show":
        return _show(parsed.name, parsed.overrides)
    print(listing())
    return 0


def listing() -> str:
    """Three lines per recipe: its name, what it is for, what it needs."""
    entries = [
        f"{name}\n    {resources.summary(path)}\n    needs: {resources.needs(path)}"
        for name, path in resources.options("recipe").items()
    ]
    hint = "jointq quantize recipe=NAME runs one, jointq recipes show NAME prints it in full"
    return "\n".join([*entries, "", hint])


def _show(name: str, overrides: list[str]) -> int:
    from jointq_cli.cli.compose import launch  # brings hydra, which the listing does without

    return launch("quantize", [f"recipe={name}", *overrides, "--cfg", "job"], lambda recipe, job: None, divided=False)
