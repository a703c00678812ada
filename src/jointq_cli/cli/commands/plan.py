"""`jointq plan`: the stages of quantize with the same arguments, their costs, and which of them the store has."""

from typing import TYPE_CHECKING

from jointq_cli.cli.compose import Job, launch
from jointq_cli.cli.config_errors import UsageError
from jointq_cli.report import Console

if TYPE_CHECKING:
    from jointq_cli.recipe import Recipe


def main(arguments: list[str]) -> int:
    if {"-m", "--multirun"} & set(arguments) or any(_key(word) == "hydra.mode" for word in arguments):
        raise UsageError("jointq plan covers one run; plan each setting of the sweep separately, without -m")
    # Without hydra.run.dir: Hydra would make the directory, although nothing is run.
    return launch("plan", [word for word in arguments if _key(word) != "hydra.run.dir"], run, divided=False)


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def run(recipe: "Recipe", job: Job) -> None:
    from jointq_cli.pipeline import plan  # brings transformers, which takes seconds to import

    with Console() as console:
        plan(recipe, console)
