"""The two plots that all figures are."""

import math
import re
from base64 import b64decode
from io import BytesIO
from xml.etree import ElementTree

from PIL import Image

from jointq_cli.report.figures.plots import Series, far_apart, heat_map, point_plot, series_style

TEXT = "{http://www.w3.org/2000/svg}text"


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(TEXT)]


def line(svg: str) -> tuple[int, int]:
    """Of how many pieces the line of the only series is, and how many points it joins to the one before."""
    [path] = re.findall(r'<path d="([^"]*)"[^>]*stroke-opacity: 0.5', svg)
    return path.count("M"), path.count("L")


def test_neighbours_within_their_errors_are_not_joined() -> None:
    series = [Series(None, [(1, 1.0), (2, 1.1), (3, 3.0), (4, 5.0)], [0.1] * 4)]
    [figure] = point_plot("t", "c", series, x="setting", y="KL")
    assert line(figure.svg) == (2, 2)  # the first stands alone


def test_points_without_errors_are_joined() -> None:
    [figure] = point_plot("t", "c", [Series(None, [(1, 1.0), (2, 1.1), (3, 3.0)])], x="block", y="E_y")
    assert line(figure.svg) == (1, 2)


def test_what_an_axis_cannot_show_is_left_out_and_counted() -> None:
    series = [Series("a", [(1, 1.0), (2, 0.0), (3, math.nan)]), Series("nothing", [(1, -1.0)])]
    [figure] = point_plot("t", "A caption", series, x="block", y="E_y", log_y=True)
    assert figure.caption == "A caption. 3 points that no such axis can show left out"
    assert "a" in texts(figure.svg)
    assert "nothing" not in texts(figure.svg)
    assert point_plot("t", "c", series[1:], x="block", y="E_y", log_y=True) == []


def test_a_logarithmic_axis_of_a_small_range_has_texts_that_differ() -> None:
    for low in (0.0105, 0.00105):
        series = [Series(None, [(1, low), (2, 1.6 * low)])]
        [figure] = point_plot("t", "c", series, x="block", y="E_w", log_y=True)
        ticks = [text for text in texts(figure.svg) if re.fullmatch(r"0\.0\d+|\d\.\de-\d", text)]
        assert len(set(ticks)) == len(ticks) >= 3


def test_rows_are_named_from_above_and_a_long_name_in_the_legend_has_lines() -> None:
    series = [Series("quantizer=gptq, symmetric=true, bits=3", [(0.1, 0), (0.2, 1)], [0.01, 0.01])]
    [figure] = point_plot("t", "c", series, x="KL", rows=["first", "second"])
    heights = {element.text: float(element.get("y", "0")) for element in ElementTree.fromstring(figure.svg).iter(TEXT)}
    assert heights["first"] < heights["second"]
    assert all(text in figure.svg for text in (">quantizer=gptq,<", ">symmetric=true, bits=3<"))


def test_a_heat_map_has_a_text_per_number_and_is_darker_for_more() -> None:
    [figure] = heat_map("t", "c", [[2.0, 4.0], [3.0, math.nan]], ["q_proj", "o_proj"], x="block")
    assert {"2", "3", "4"} <= set(texts(figure.svg))
    [picture] = re.findall(r"base64,([^\"]+)", figure.svg)
    alphas = Image.open(BytesIO(b64decode(picture))).convert("RGBA").getchannel("A")
    place = [(x * alphas.width // 4, y * alphas.height // 4) for y in (1, 3) for x in (1, 3)]
    two, four, three, none = (alphas.getpixel(at) for at in place)
    assert none == 0 < two < three < four
    assert heat_map("t", "c", [[math.nan]], ["q_proj"], x="block") == []


def test_more_series_than_colours_are_distinguished_by_their_markers() -> None:
    assert len({series_style(index) for index in range(64)}) == 64


def test_an_axis_is_logarithmic_where_positive_values_are_far_apart() -> None:
    assert far_apart([1, 3, 8])
    assert not far_apart([1, 3, 7])
    assert not far_apart([0, 100])
    assert not far_apart([])
