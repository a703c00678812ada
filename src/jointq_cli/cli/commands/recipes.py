"""`jointq recipes`: the bundled recipes, with their purpose and what they need."""

import argparse

from jointq_cli.cli import config_files


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("jointq recipes", description="List the recipes, or show one in full.")
    words = parser.add_subparsers(dest="word", metavar="")
    show = words.add_parser("show", help="print the complete config of a recipe")
    show.add_argument("name", help="a recipe's name")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    parsed = parser.parse_args(arguments)
    if parsed.word == "show":
        return _show(parsed.name, parsed.overrides)
    print(listing())
    return 0


def listing() -> str:
    """Three lines per recipe: its name, its purpose, what it needs."""
    entries = [
        f"{name}\n    {config_files.summary(path)}\n    needs: {config_files.needs(path)}"
        for name, path in config_files.options("recipe").items()
    ]
    hint = "jointq quantize recipe=NAME runs one, jointq recipes show NAME prints it in full"
    return "\n".join([*entries, "", hint])


def _show(name: str, overrides: list[str]) -> int:
    from jointq_cli.cli.compose import launch  # imports hydra, which the listing does without

    return launch("quantize", [f"recipe={name}", *overrides, "--cfg", "job"], lambda recipe, job: None, divided=False)
