"""Several runs side by side, or a sweep, as one HTML file. Knows its template; imports matplotlib."""

from collections.abc import Sequence

from jointq_cli.report.compare.runs import Run
from jointq_cli.report.figures.comparison import draw_comparison
from jointq_cli.report.figures.style import Picture
from jointq_cli.report.pages.run import environment
from jointq_cli.report.tables.table import Sheet

TEMPLATE = "comparison.html.jinja"


def render_comparison(runs: Sequence[Run], sheet: Sheet) -> str:
    """sheet: what is told of these runs."""
    return render_sheet_page(sheet, draw_comparison(runs))


def render_sheet_page(sheet: Sheet, pictures: Sequence[Picture]) -> str:
    return environment().get_template(TEMPLATE).render(title=sheet.title, sheet=sheet, pictures=pictures)
