"""`jointq calibrate`: a recipe's calibration tokens in one file, for a machine without network."""

from typing import TYPE_CHECKING

from jointq_cli.cli.compose import Job, launch
from jointq_cli.report import Console

if TYPE_CHECKING:
    from jointq_cli.recipe import CalibrateRecipe


def main(arguments: list[str]) -> int:
    return launch("calibrate", arguments, run)


def run(recipe: "CalibrateRecipe", job: Job) -> None:
    from jointq_cli.pipeline import calibrate  # brings transformers, which takes seconds to import

    with Console() as console:
        calibrate(recipe, console, job.team)
