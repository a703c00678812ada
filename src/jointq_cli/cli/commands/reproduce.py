"""`jointq reproduce`: a finished run, run again from its files, and where the two differ."""

import argparse
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from jointq_cli.errors import AlreadyReported, JointqError
from jointq_cli.system.files import write_text_atomically
from jointq_cli.system.run_directory import new_directory

JSON, MARKDOWN = "reproduction.json", "reproduction.md"


def main(arguments: list[str]) -> int:
    """Returns 0 if the runs are identical or within the tolerance, if there is one; else 1."""
    parsed = _parser().parse_intermixed_args(arguments)
    if parsed.against is not None and (parsed.overrides or parsed.directory):
        raise JointqError("--against compares two finished runs; --directory and KEY=VALUE are for a replay")
    _check_alone()
    # Not above: these import torch, and --help answers without.
    from jointq_cli.cli.commands.quantize import run
    from jointq_cli.cli.replay import replay
    from jointq_cli.recipe import setting_roles
    from jointq_cli.records import DIFFERENT
    from jointq_cli.report import Console, encode
    from jointq_cli.report.finished_run import read_finished_run
    from jointq_cli.report.pages.documents import document_markdown
    from jointq_cli.report.reproduction import compare, reproduction_document

    original = read_finished_run(parsed.run_directory)
    place = parsed.against or parsed.directory or fresh_beside(parsed.run_directory)
    if parsed.against is None:
        try:
            replay(original, place, parsed.overrides, ["reproduce", *arguments], run)
        finally:
            if parsed.directory is None:
                with suppress(OSError):
                    place.rmdir()  # if the replay has left nothing
    found = compare(original, read_finished_run(place), setting_roles(), parsed.tolerance)
    document = reproduction_document(found)
    if parsed.against is None:
        write_text_atomically(place / JSON, encode(found))
        write_text_atomically(place / MARKDOWN, document_markdown(document))
    with Console() as console:
        console.show(document)
    return 1 if found.verdict == DIFFERENT else 0


def _check_alone() -> None:
    """Raises JointqError under torchrun, of which rank 0 alone reports."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        error = JointqError(f"WORLD_SIZE={size}: a replay is run by one process, so start it without torchrun")
        raise error if os.environ.get("RANK", "0") == "0" else AlreadyReported(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jointq reproduce",
        description="Run a finished run of jointq quantize again, with nothing reused, and compare the two.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_directory",
        type=Path,
        metavar="RUN",
        help="needs recipe.yaml, manifest.json and report.json; with codes/ differences are counted",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings that do not decide the result: runtime.num_threads, runtime.device, model.path",
    )
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="directory of the replay (default: reproduced_DATE beside RUN)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="OTHER", help="compare with another finished run instead of a replay"
    )
    parser.add_argument(
        "--tolerance",
        type=_share,
        metavar="SHARE",
        help="accept other bits where both perplexities and KL divergence change by no more than this share, as 0.1",
    )
    return parser


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"{text}: must be a share from 0 to 1, such as 0.1 for ten percent")


def fresh_beside(run: Path) -> Path:
    return new_directory(run.resolve().parent / f"reproduced_{datetime.now():%Y-%m-%d_%H-%M-%S}")
