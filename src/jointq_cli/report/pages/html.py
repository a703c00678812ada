"""Self-contained HTML pages: no scripts, fonts or images from elsewhere. Imports matplotlib for the figures."""

from collections.abc import Sequence

from jointq_cli.records import RunReport
from jointq_cli.report.comparison import RunComparison
from jointq_cli.report.figures.comparison import comparison_figures
from jointq_cli.report.figures.run import run_figures
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.pages.markdown import template
from jointq_cli.report.tables.run import run_document
from jointq_cli.report.tables.table import TableDocument


def run_html(report: RunReport) -> str:
    """The report of one run."""
    return document_html(run_document(report), run_figures(report))


def comparison_html(comparison: RunComparison, document: TableDocument) -> str:
    """document: the tables of this comparison."""
    return document_html(document, comparison_figures(comparison))


def document_html(document: TableDocument, figures: Sequence[SvgFigure]) -> str:
    return template("document.html.jinja").render(document=document, figures=figures)
