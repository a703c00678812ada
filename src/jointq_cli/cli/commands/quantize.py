"""`jointq quantize`: from a recipe to a quantised checkpoint and a report of its quality."""

from typing import TYPE_CHECKING

from jointq_cli.cli.compose import Job, launch
from jointq_cli.errors import UntrustedResult
from jointq_cli.report import Console
from jointq_cli.report.run_files import parse_settings
from jointq_cli.report.summary import problems
from jointq_cli.system.run_directory import claimed
from jointq_cli.tracking import NoTracking, tracked

if TYPE_CHECKING:
    from jointq_cli.recipe import Recipe


def main(arguments: list[str]) -> int:
    return launch("quantize", arguments, run)


def run(recipe: "Recipe", job: Job) -> None:
    """Raises UntrustedResult when the run was completed but its result cannot be trusted."""
    from jointq_cli.pipeline import quantize  # brings transformers, which takes seconds to import

    with claimed(job.directory, new=job.new) as directory:
        directory.claim(recipe.model.path)
        directory.write_recipe(job.config)
        directory.write_overrides(job.overrides)
        settings = parse_settings(job.config, directory.path)
        tracking = recipe.tracking if job.team.rank == 0 else NoTracking()
        with (
            Console(directory.log, quiet=job.elsewhere, brief=job.label) as console,
            tracked(tracking, directory.path, settings, console, in_sweep=job.number is not None) as track,
        ):
            report = quantize(recipe, directory, console, job.team)
            if report:
                track.has_report(report)
            found = problems(report) if report else []
            if found:
                raise UntrustedResult(f"{'; '.join(found)}; see {directory.report_markdown}")
