"""`jointq calibrate`: a recipe's calibration tokens in one file, for a machine without network."""

from jointq_cli.cli.compose import Job, launch
from jointq_cli.pipeline import calibrate
from jointq_cli.recipe import CalibrateRecipe
from jointq_cli.report import Console


def main(arguments: list[str]) -> int:
    return launch("calibrate", arguments, run)


def run(recipe: CalibrateRecipe, job: Job) -> None:
    with Console() as console:
        calibrate(recipe, console, job.team)
