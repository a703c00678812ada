"""`jointq check`: whether the figures of a finished run are within limits, for CI jobs."""

import argparse
import math
from contextlib import suppress
from pathlib import Path

from jointq_cli.errors import JointqError
from jointq_cli.report.limits import AT_LEAST, checked
from jointq_cli.report.measured import figures
from jointq_cli.report.run_files import RECIPE, load_settings, read_report


def main(arguments: list[str]) -> int:
    """Returns 0 if all figures are within their limits, else 1."""
    parsed = _parser().parse_args(arguments)
    found = figures(read_report(parsed.run_directory))
    limits = dict([*map(_most, parsed.most), *map(_least, parsed.least)]) or _of_recipe(parsed.run_directory / RECIPE)
    lines = checked(found, limits)
    exceeded = [line for line, holds in lines.items() if not holds]
    print("\n".join(exceeded or lines))
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


def _most(word: str) -> tuple[str, float]:
    """Raises JointqError for an upper limit of a figure that cannot be too large."""
    name, value = _figure(word)
    if name in AT_LEAST:
        raise JointqError(f"--max {name}: of this figure more is better; --min {name}=...")
    return name, value


def _least(word: str) -> tuple[str, float]:
    """Raises JointqError for a lower limit of a figure that cannot be too small."""
    name, value = _figure(word)
    if name not in AT_LEAST:
        raise JointqError(f"--min {name}: of this figure less is better; --max {name}=...")
    return name, value


def _figure(word: str) -> tuple[str, float]:
    name, _, text = word.partition("=")
    with suppress(ValueError):
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if name and not math.isnan(value):
            return name, value
    raise JointqError(f"{word}: must be FIGURE=NUMBER, such as kl=0.02 or perplexity_increase=1%")


def _of_recipe(file: Path) -> dict[str, float]:
    """Raises JointqError where the recipe sets none."""
    settings = load_settings(file)
    words = {key.removeprefix("limits."): value for key, value in settings.items() if key.startswith("limits.")}
    found = dict(_figure(f"{name}={value}") for name, value in words.items() if value != "null")
    if not found:
        raise JointqError(f"{file}: sets no limits; name some: --max kl=0.02")
    return found
