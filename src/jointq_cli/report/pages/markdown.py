"""Documents and tables as Markdown."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from jointq_cli.records import RunReport
from jointq_cli.report.number_format import KeyMetric
from jointq_cli.report.tables.run import run_document
from jointq_cli.report.tables.table import TableDocument, TextTable

if TYPE_CHECKING:
    from jinja2 import Environment

WORST = 10  # layers; layers.csv has all


def run_markdown(report: RunReport) -> str:
    return document_markdown(run_document(report, WORST))


def document_markdown(document: TableDocument) -> str:
    return environment(escape=False).get_template("document.md.jinja").render(document=document)


@cache
def environment(*, escape: bool) -> "Environment":
    """The templates of this package. escape: whether texts are escaped for HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # imported where something is rendered

    found = Environment(
        loader=PackageLoader("jointq_cli", "report/pages"), autoescape=escape, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    found.filters.update(inline=inline, markdown=markdown_table, metrics=metrics_table, origin=origin_table)
    return found


def markdown_table(table: TextTable) -> str:
    rule = ["---" if column < table.stub else "---:" for column in range(len(table.heading))]
    rows = [[inline(cell).replace("|", "\\|") for cell in row] for row in [table.heading, rule, *table.rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def metrics_table(metrics: Sequence[KeyMetric]) -> TextTable:
    return TextTable("", ["metric", "value", "note"], [[one.label, one.value, one.detail] for one in metrics], stub=3)


def origin_table(pairs: Sequence[tuple[str, str]]) -> TextTable:
    return TextTable("", ["what", "value"], [list(pair) for pair in pairs], stub=2)


def inline(text: str) -> str:
    """On one line, and with < escaped, so that no text becomes HTML."""
    return " ".join(text.split()).replace("<", "&lt;")
