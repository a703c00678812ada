"""`jointq export`: the model of a finished run as packed checkpoints for the runtimes that serve models."""

import argparse
from pathlib import Path

from jointq_cli.errors import JointqError, UntrustedResult


def main(arguments: list[str]) -> int:
    parsed = _parser().parse_intermixed_args(arguments)
    settings = dict(_setting(word) for word in parsed.settings)
    asked = settings.pop("export", "")  # the key of jointq quantize
    asked = settings.pop("format", asked)
    words = [word.strip() for word in asked.strip("[]").split(",") if word.strip()]
    output = settings.pop("output", None)
    # Not above: these import torch, and --help answers without.
    from jointq_cli.formats.export import EXPORTERS, IMATRIX, exporter_of, exporters_of
    from jointq_cli.pipeline import export, export_importance
    from jointq_cli.report import Console

    if not words:
        raise JointqError(f"format=: names no format; there are {', '.join(EXPORTERS)} and {IMATRIX}")
    if len(words) > 1 and (settings or output):
        key = "output" if output else next(iter(settings))
        raise JointqError(f"{key}={output or settings[key]}: for one format, and {', '.join(words)} are {len(words)}")
    place = Path(output).expanduser() if output else None
    if words == [IMATRIX]:
        if settings:
            key = next(iter(settings))
            raise JointqError(f"{key}={settings[key]}: {IMATRIX} has no settings")
        with Console() as console:
            export_importance(parsed.run_directory, place, console)
        return 0
    exporters = exporters_of(words) if len(words) > 1 else [exporter_of(words[0], settings)]
    with Console() as console:
        records = export(parsed.run_directory, exporters, place, console)
    found = [problem for record in records if record.check for problem in record.check.problems]
    if found:
        raise UntrustedResult("; ".join(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jointq export",
        description="Write the model of a finished run of jointq quantize as a packed checkpoint, and read it back.",
        epilog="Formats and their settings: docs/serving.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_directory", type=Path, metavar="RUN", help="needs checkpoint/, codes/, recipe.yaml and report.json"
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="format=compressed-tensors, or a list format=[gguf:q4_0,mlx]; output=DIR (default: RUN/export/FORMAT); "
        "settings of the format",
    )
    return parser


def _setting(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise JointqError(f"{word}: not a setting; write format={word}" if key else f"{word}: not a setting")
    return key, value
