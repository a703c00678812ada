"""`jointq evaluate`: the perplexity of any checkpoint, and its distance from a reference."""

from jointq_cli.cli.compose import Job, launch
from jointq_cli.pipeline import evaluate
from jointq_cli.recipe import EvaluateRecipe
from jointq_cli.report import Console
from jointq_cli.system.run_directory import claimed


def main(arguments: list[str]) -> int:
    return launch("evaluate", arguments, run)


def run(recipe: EvaluateRecipe, job: Job) -> None:
    with claimed(job.directory, new=job.new) as directory:
        directory.write_recipe(job.config)
        directory.write_overrides(job.overrides)
        with Console(directory.log, quiet=job.elsewhere, brief=job.label) as console:
            evaluate(recipe, directory, console, job.team)
