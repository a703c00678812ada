"""`jointq plan`: what quantize would do with the same words, what that takes, and what there is already."""

from jointq_cli.cli.compose import Job, launch
from jointq_cli.cli.config_errors import UsageError
from jointq_cli.pipeline import plan
from jointq_cli.recipe import Recipe
from jointq_cli.report import Console


def main(arguments: list[str]) -> int:
    if {"-m", "--multirun"} & set(arguments) or any(_key(word) == "hydra.mode" for word in arguments):
        raise UsageError("jointq plan tells of one run; give each setting of the sweep by itself, without -m")
    # Hydra would make the directory of a run that there will not be.
    return launch("plan", [word for word in arguments if _key(word) != "hydra.run.dir"], run, divided=False)


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def run(recipe: Recipe, job: Job) -> None:
    with Console() as console:
        plan(recipe, console)
