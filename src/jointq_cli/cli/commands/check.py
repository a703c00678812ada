"""`jointq check`: whether the figures of a finished run are within limits, for CI jobs."""

import argparse
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from jointq_cli.errors import JointqError
from jointq_cli.records import EvaluationReport, RunReport
from jointq_cli.report import load_record, load_report
from jointq_cli.report.compare.run_files import EVALUATION, RECIPE, REPORT, load_settings
from jointq_cli.report.limits import AT_LEAST, Limit, beyond, figures
from jointq_cli.system.sweep_directory import SweepDirectory


def main(arguments: list[str]) -> int:
    """Returns 0 if all figures are within their limits, else 1."""
    parsed = _parser().parse_args(arguments)
    found = figures(_load(parsed.run_directory))
    limits = [*_typed(parsed.most, at_least=False), *_typed(parsed.least, at_least=True)]
    limits = limits or _of_recipe(parsed.run_directory / RECIPE)
    exceeded = beyond(found, limits)
    for line in exceeded or [limit.line(found[limit.figure]) for limit in limits]:
        print(line)
    return 1 if exceeded else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jointq check",
        description="Check the figures of a finished run against limits, by default those of its recipe. "
        "Exits with 1, and a line for each figure beyond its limit.",
        epilog="Figures: perplexity, perplexity_increase (a share: 1% or 0.01), nll_increase, kl, top1_agreement, "
        "and of jointq quantize also bits_per_weight, packed_bytes, checkpoint_bytes, coverage.",
        allow_abbrev=False,
    )
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="of jointq quantize or jointq evaluate")
    for option, place, word in (("--max", "most", "above"), ("--min", "least", "below")):
        parser.add_argument(
            option,
            action="append",
            default=[],
            dest=place,
            metavar="FIGURE=VALUE",
            help=f"this figure may not be {word} this value; can be given several times",
        )
    return parser


def _load(directory: Path) -> RunReport | EvaluationReport:
    if (directory / REPORT).is_file():
        return load_report(directory / REPORT)
    if (directory / EVALUATION).is_file():
        report: EvaluationReport = load_record(EvaluationReport, directory / EVALUATION)
        return report
    if SweepDirectory(directory).exists:
        raise JointqError(f"{directory}: a sweep; name one of its runs, such as {directory / '0'}")
    raise JointqError(f"{directory}: has neither {REPORT} nor {EVALUATION}, so it is no finished run")


def _typed(words: Iterable[str], *, at_least: bool) -> list[Limit]:
    """Raises JointqError for an upper limit of a figure that cannot be too large."""
    found = [Limit(*_figure(word), at_least) for word in words]
    if turned := next((limit for limit in found if not at_least and limit.figure in AT_LEAST), None):
        raise JointqError(f"--max {turned.figure}: of this figure more is better; --min {turned.figure}=...")
    return found


def _figure(word: str) -> tuple[str, float]:
    name, _, text = word.partition("=")
    with suppress(ValueError):
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if name and not math.isnan(value):
            return name, value
    raise JointqError(f"{word}: must be FIGURE=NUMBER, such as kl=0.02 or perplexity_increase=1%")


def _of_recipe(file: Path) -> list[Limit]:
    """Raises JointqError where the recipe sets none."""
    settings = load_settings(file)
    words = {key.removeprefix("limits."): value for key, value in settings.items() if key.startswith("limits.")}
    found = [_figure(f"{name}={value}") for name, value in words.items() if value != "null"]
    if not found:
        raise JointqError(f"{file}: sets no limits; name some: --max kl=0.02")
    return [Limit(name, value, name in AT_LEAST) for name, value in found]
