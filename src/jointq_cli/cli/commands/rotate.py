"""`jointq rotate`: a model in another basis, at full precision, checked to compute the same function."""

from typing import TYPE_CHECKING

from jointq_cli.cli.compose import Job, launch
from jointq_cli.errors import JointqError
from jointq_cli.report import Console
from jointq_cli.report.rotation_summary import problems
from jointq_cli.system.run_directory import claimed

if TYPE_CHECKING:
    from jointq_cli.recipe import RotateRecipe


def main(arguments: list[str]) -> int:
    return launch("rotate", arguments, run)


def run(recipe: "RotateRecipe", job: Job) -> None:
    """Raises JointqError when the run was completed but its result cannot be trusted."""
    from jointq_cli.pipeline import rotate  # brings transformers, which takes seconds to import

    with claimed(job.directory, new=job.new) as directory:
        directory.claim(recipe.model.path)
        directory.write_recipe(job.config)
        directory.write_overrides(job.overrides)
        with Console(directory.log, quiet=job.elsewhere, brief=job.label) as console:
            found = problems(rotate(recipe, directory, console, job.team))
            if found:
                raise JointqError(f"{'; '.join(found)}; see {directory.rotation}")
