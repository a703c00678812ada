"""Several runs side by side as one HTML file. Knows its template; imports matplotlib."""

from collections.abc import Sequence

from jointq_cli.report.comparison_pictures import draw_comparison
from jointq_cli.report.page import environment
from jointq_cli.report.sheet import Sheet
from jointq_cli.report.side_by_side import Run

TEMPLATE = "comparison.html.jinja"


def render_comparison(runs: Sequence[Run], sheet: Sheet) -> str:
    """sheet: what is told of these runs."""
    return environment().get_template(TEMPLATE).render(title=sheet.title, sheet=sheet, pictures=draw_comparison(runs))
