"""Self-contained HTML pages: no scripts, fonts or images from elsewhere. Imports matplotlib for the figures."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress

from jointq_cli.records import RunReport
from jointq_cli.report.comparison import RunComparison
from jointq_cli.report.figures.comparison import comparison_figures
from jointq_cli.report.figures.plots import SvgFigure
from jointq_cli.report.figures.run import run_figures
from jointq_cli.report.pages.markdown import environment
from jointq_cli.report.tables.run import run_document
from jointq_cli.report.tables.table import TableDocument, TextTable

WIDEST = 150  # characters of a table in a window of 1200 pixels
BREADTHS = (("", 44), ("medium", 88))  # characters that fit into 400 and 800 pixels


def run_html(report: RunReport) -> str:
    """The report of one run."""
    return document_html(run_document(report), run_figures(report))


def comparison_html(comparison: RunComparison, document: TableDocument) -> str:
    """document: the tables of this comparison."""
    return document_html(document, comparison_figures(comparison))


def document_html(document: TableDocument, figures: Sequence[SvgFigure]) -> str:
    found = environment(escape=True)
    found.filters.update(folded=_folded, breadth=_breadth, shades=_shades)
    return found.get_template("document.html.jinja").render(document=document, figures=figures)


def _folded(table: TextTable) -> list[TextTable]:
    """Heat maps and tables of texts alone fit by themselves: their cells have lines."""
    return [table] if table.shaded or table.stub == len(table.heading) else table.folded(WIDEST)


def _breadth(table: TextTable) -> str:
    if table.stub == len(table.heading):
        return ""
    characters = sum(width + 2 for width in table.widths())
    return next((name for name, most in BREADTHS if characters <= most), "broad")


def _shades(table: TextTable) -> list[list[int]]:
    """How strongly each cell of a heat map is coloured, in percent, by its place among all that are."""
    columns = range(table.stub, table.stub + table.shaded)
    numbers = [[_number(row[column]) for column in columns] for row in table.rows]
    order = sorted(number for row in numbers for number in row)
    return [[0] * table.stub + [60 * bisect_left(order, number) // len(order) for number in row] for row in numbers]


def _number(cell: str) -> float:
    """That begins a cell; 0 for none, infinity for NaN."""
    with suppress(ValueError):
        value = float(cell.split(" ")[0])
        return math.inf if math.isnan(value) else value
    return 0.0
