"""`jointq quantize`: a recipe in, a checkpoint and a report of what it costs out."""

from jointq_cli.config import Recipe
from jointq_cli.errors import JointqError
from jointq_cli.launch import Job, launch
from jointq_cli.pipeline import quantize
from jointq_cli.records import RunReport
from jointq_cli.report import Console
from jointq_cli.run_directory import RunDirectory


def main(arguments: list[str]) -> int:
    return launch("quantize", arguments, run)


def run(recipe: Recipe, job: Job) -> None:
    """Raises JointqError when the run went through but its result cannot be trusted."""
    directory = RunDirectory(job.directory)
    directory.write_recipe(job.config)
    directory.write_overrides(job.overrides)
    with Console(directory.log) as console:
        report = quantize(recipe, directory, console)
        found = faults(report)
        if found:
            raise JointqError(f"{'; '.join(found)}; see {directory.report_markdown}")


def faults(report: RunReport) -> list[str]:
    """What is wrong with a finished run, each as half a sentence; empty when nothing is."""
    found = []
    failed = [layer.name for layer in report.layers if layer.verdict == "fallback"]
    if failed:
        count = f"{len(failed)} of {len(report.layers)} layers"
        found.append(f"{count} could not be solved and fell back to RTN, the first is {failed[0]}")
    if not report.audit.passed:
        found.append("the checkpoint's other tensors differ from the source's")
    if report.reload_check != "identical":
        found.append(f"the checkpoint as read back differs from the model in memory: {report.reload_check}")
    return found
