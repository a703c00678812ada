"""Documents as Markdown, and the templates of all pages."""

from functools import cache
from typing import TYPE_CHECKING

from jointq_cli.records import RunReport
from jointq_cli.report.tables.run import run_document
from jointq_cli.report.tables.table import TableDocument

if TYPE_CHECKING:
    from jinja2 import Template

WORST = 10  # layers; layers.csv has all


def run_markdown(report: RunReport) -> str:
    return document_markdown(run_document(report, WORST))


def document_markdown(document: TableDocument) -> str:
    return template("document.md.jinja").render(document=document)


@cache
def template(name: str) -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined  # imported where something is rendered

    found = Environment(
        loader=PackageLoader("jointq_cli", "report/pages"), autoescape=".html" in name, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    found.filters.update(inline=inline, cell=lambda text: inline(text).replace("|", "\\|"))
    return found.get_template(name)


def inline(text: str) -> str:
    """On one line, and with < escaped, so that no text becomes HTML."""
    return " ".join(text.split()).replace("<", "&lt;")
