"""Documents as Markdown and as self-contained HTML pages: no scripts, fonts or images from elsewhere."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from jointq_cli.report.comparison import RunComparison
from jointq_cli.report.tables.table import TableDocument

if TYPE_CHECKING:
    from jinja2 import Template

    from jointq_cli.report.figures.plots import SvgFigure


def document_markdown(document: TableDocument) -> str:
    return template("document.md.jinja").render(document=document)


def document_html(document: TableDocument, figures: Sequence["SvgFigure"]) -> str:
    return template("document.html.jinja").render(document=document, figures=figures)


def comparison_html(comparison: RunComparison, document: TableDocument) -> str:
    """document: the tables of this comparison."""
    from jointq_cli.report.figures.comparison import comparison_figures  # imports matplotlib

    return document_html(document, comparison_figures(comparison))


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
