"""Several runs side by side, or a sweep, as one HTML file. Knows its template; imports matplotlib."""

from collections.abc import Sequence

from jointq_cli.report.canvas import Picture
from jointq_cli.report.comparison_pictures import draw_comparison
from jointq_cli.report.page import environment
from jointq_cli.report.sheet import Sheet
from jointq_cli.report.side_by_side import Run

TEMPLATE = "comparison.html.jinja"


def render_comparison(runs: Sequence[Run], sheet: Sheet) -> str:
    """sheet: what is told of these runs."""
    return render_sheet_page(sheet, draw_comparison(runs))


def render_sheet_page(sheet: Sheet, pictures: Sequence[Picture]) -> str:
    return environment().get_template(TEMPLATE).render(title=sheet.title, sheet=sheet, pictures=pictures)
