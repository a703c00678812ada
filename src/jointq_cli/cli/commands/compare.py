"""`jointq compare`: finished runs side by side, from their report.json and recipe.yaml."""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from jointq_cli.errors import JointqError
from jointq_cli.report import Console
from jointq_cli.report.comparison import RunComparison
from jointq_cli.report.pages.documents import document_markdown
from jointq_cli.report.run_files import load_runs
from jointq_cli.report.tables.comparison import comparison_document
from jointq_cli.report.tables.table import TableDocument
from jointq_cli.system.files import write_text_atomically

PAGE = "compare.html"


def main(arguments: list[str]) -> int:
    parsed = _parser().parse_intermixed_args(_with_a_file_for_html(arguments))
    if parsed.html is not None:
        _check_place(parsed.html)
    comparison = RunComparison(load_runs(parsed.runs))
    document = comparison_document(comparison)
    if parsed.markdown:
        print(document_markdown(document), end="")
    elif parsed.html is not None:
        print(_write_page(comparison, document, parsed.html))
    else:
        with Console() as console:
            console.show(document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jointq compare",
        description="Show finished runs side by side, which is best, and which are not distinguishable from it.",
        allow_abbrev=False,  # --htm RUN would be a file again
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a sweep's for all its runs"
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--markdown", action="store_true", help="print it as markdown")
    forms.add_argument("--html", nargs="?", type=Path, metavar="FILE.html", help=f"write a page ({PAGE} if not named)")
    return parser


def _with_a_file_for_html(arguments: Sequence[str]) -> list[str]:
    """`--html RUN` means the default file and a run: argparse would write the page over the run."""
    return [
        f"--html={PAGE}" if word == "--html" and not after.endswith(".html") else word
        for word, after in pairwise([*arguments, ""])
    ]


def _check_place(file: Path) -> None:
    """Checked before any work: a page takes a while to draw."""
    if file.is_dir():
        raise JointqError(f"{file}: is a directory; --html needs a file")
    if not file.parent.is_dir():
        raise JointqError(f"{file}: there is no directory {file.parent}")


def _write_page(comparison: RunComparison, document: TableDocument, file: Path) -> Path:
    from jointq_cli.report.pages.documents import comparison_html  # imports matplotlib, for this form only

    write_text_atomically(file, comparison_html(comparison, document))
    return file
