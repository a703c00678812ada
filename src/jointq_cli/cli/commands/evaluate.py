"""`jointq evaluate`: the perplexity of any checkpoint, and its distance from a reference."""

from typing import TYPE_CHECKING

from jointq_cli.cli.compose import Job, launch
from jointq_cli.errors import UntrustedResult
from jointq_cli.report import Console
from jointq_cli.report.summary import evaluation_problems
from jointq_cli.system.run_directory import claimed

if TYPE_CHECKING:
    from jointq_cli.recipe import EvaluateRecipe


def main(arguments: list[str]) -> int:
    return launch("evaluate", arguments, run)


def run(recipe: "EvaluateRecipe", job: Job) -> None:
    """Raises UntrustedResult when the evaluation was completed but its result cannot be used."""
    from jointq_cli.pipeline import evaluate  # brings transformers, which takes seconds to import

    with claimed(job.directory, new=job.new) as directory:
        directory.write_recipe(job.config)
        directory.write_overrides(job.overrides)
        with Console(directory.log, quiet=job.elsewhere, brief=job.label) as console:
            found = evaluation_problems(evaluate(recipe, directory, console, job.team))
            if found and job.team.rank == 0:  # one process says it
                raise UntrustedResult(f"{'; '.join(found)}; see {directory.path / 'evaluation.json'}")
