"""The files of a report: they can be read again, and a person can read them."""

import csv
import dataclasses
import json
import math
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from jointq_cli import __version__
from jointq_cli.errors import JointqError, ResourceError
from jointq_cli.records import Generation, LayerRecord, Perplexity
from jointq_cli.report import load_report, write_report
from jointq_cli.report.pages.run import run_html, run_markdown
from jointq_cli.report.tables.run import errors_by_block, run_document
from jointq_cli.system.run_directory import RunDirectory


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.fixture(scope="session")
def page(troubled):
    """The page of the troubled run; drawing takes a second."""
    return run_html(troubled)


def test_a_report_comes_back_from_its_json_as_it_was(troubled, directory):
    write_report(troubled, directory)
    assert load_report(directory.report_json) == troubled


def test_numbers_that_are_none_come_back_too_and_the_file_stays_json(report, directory):
    layers = [replace(report.layers[0], output_error=math.inf, damping=None), *report.layers[1:]]
    odd = replace(report, layers=layers, quantized=Perplexity(math.nan, math.nan, math.nan, math.nan))
    write_report(odd, directory)
    json.loads(directory.report_json.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    again = load_report(directory.report_json)
    assert again.layers == odd.layers
    assert math.isnan(again.quantized.value)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({}, r"missing required field `name` - at `\$.layers\[0\]`"),
        ({"name": 4}, r"Expected `str`, got `int` - at `\$.layers\[0\].name`"),
    ],
)
def test_a_record_that_cannot_be_read_is_reported_in_one_line_with_its_writer(report, directory, layer, message):
    write_report(report, directory)
    value = json.loads(directory.report_json.read_text(encoding="utf-8"))
    directory.report_json.write_text(json.dumps(value | {"layers": [layer]}), encoding="utf-8")
    with pytest.raises(JointqError, match=message) as caught:
        load_report(directory.report_json)
    start = f"{directory.report_json}: not readable by jointq {__version__} (jointq 0.1.0 wrote it): "
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize("odd", [{"block": "3"}, {"output_error": "0.5"}])
def test_text_is_no_number_but_for_those_that_json_lacks(report, directory, odd):
    write_report(report, directory)
    value = json.loads(directory.report_json.read_text(encoding="utf-8"))
    value["layers"][1] |= odd
    directory.report_json.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(JointqError, match=rf"Expected a number, got text - at `\$.layers\[1\].{next(iter(odd))}`"):
        load_report(directory.report_json)


def test_keys_of_a_later_version_are_left_out(report, directory):
    write_report(report, directory)
    value = json.loads(directory.report_json.read_text(encoding="utf-8"))
    value["protocol"]["colour"] = value["colour"] = {"red": 1}
    directory.report_json.write_text(json.dumps(value), encoding="utf-8")
    assert load_report(directory.report_json) == report


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_a_damaged_report_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(JointqError, match="not valid JSON"):
        load_report(tmp_path / "report.json")


def test_a_missing_report_is_reported_in_one_line(tmp_path):
    with pytest.raises(JointqError, match=r"report\.json: cannot be read"):
        load_report(tmp_path / "report.json")


def test_the_csv_has_a_row_per_layer_at_full_precision(troubled, directory):
    write_report(troubled, directory)
    with directory.layers.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(LayerRecord)]
    assert [row["name"] for row in rows] == [layer.name for layer in troubled.layers]
    assert [float(row["output_error"]) for row in rows] == [layer.output_error for layer in troubled.layers]
    assert json.loads(rows[7]["notes"]) == {"reason": "not definite"}


def test_the_same_report_gives_the_same_bytes(troubled, page):
    assert run_html(troubled) == page


def test_the_markdown_has_the_verdict_the_worst_layer_and_what_is_wrong(troubled, directory):
    write_report(troubled, directory)
    text = directory.report_markdown.read_text(encoding="utf-8")
    assert "**4.31 bits per weight; perplexity 18.27 → 19.34 (+5.8 %), KL 0.0513 nats**" in text
    assert "> **Problem:** 1 layer fell back to RTN: model.layers.1.self_attn.q_proj" in text
    assert "| model.layers.1.self_attn.q_proj | fallback |" in text
    assert "> **Warning:** the calibration text was &lt;used> twice" in text
    titles = ["Problem:", "Warning:", "| perplexity |", "Where the error is", "largest output error"]
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    assert troubled.protocol.line() in text


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(troubled, directory):
    write_report(troubled, directory)
    text = directory.report_markdown.read_text(encoding="utf-8")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def table_of(page, title):
    """Heading and rows of a table, as text; and the classes of its rows."""
    for section in ElementTree.fromstring(page).iter("section"):
        if section.findtext("h2") == title:
            rows = section.findall(".//tr")
            texts = [["".join(cell.itertext()).replace("\u200b", "") for cell in row] for row in rows]
            return texts[0], texts[1:], [row.get("class") for row in rows[1:]]
    raise AssertionError(title)


def test_the_page_is_well_formed_and_shows_every_layer(troubled, page):
    heading, rows, classes = table_of(page, "Layers")
    assert [row[0] for row in rows] == [layer.name for layer in troubled.layers]
    assert (classes[7], classes[20], set(classes) - {None}) == ("fallback", "damped", {"fallback", "damped"})
    assert rows[7][heading.index("reason")] == "not definite"


def test_verdict_and_warnings_come_before_metrics_errors_by_block_and_tables(troubled, page):
    texts = ("audit failed", troubled.warnings[0][:24], "KL divergence", "Where the error is", "<img", "Where the time")
    places = [page.index(text) for text in texts]
    assert places == sorted(places)


def test_the_heat_map_has_a_row_per_block_and_shades_the_largest_error_most(troubled, page):
    heading, rows, _ = table_of(page, "Where the error is: E_y by block and kind")
    assert heading == ["block", *dict.fromkeys(layer.kind for layer in troubled.layers), "accumulated"]
    assert rows[1][:2] == ["1", "3.1e-1"]
    assert len(rows) == 31  # with the medians
    shades = re.findall(r"--heat\) / (\d+)%\)[^>]*>([^<]*)<", page)
    assert max(shades, key=lambda each: int(each[0]))[1] == "3.1e-1"
    assert len(shades) == 210


def test_bits_stand_in_the_heat_map_where_they_differ(report):
    layers = [replace(layer, bits_per_weight=2.0 + layer.block % 2) for layer in report.layers]
    table = errors_by_block(replace(report, layers=layers))
    assert [row[1].split(" / ")[1] for row in table.rows[:2]] == ["2.0", "3.0"]
    assert "bits per weight" in table.note


def test_words_are_explained_where_they_first_stand(report):
    text = run_markdown(report)
    assert "damping: fraction of the Hessian's mean diagonal" in text.split("| metric |")[0]
    for word in ("E_y", "E_w", "accumulated"):
        assert text.count(f"{word}: ") == 1
    assert not re.search("lambda:|turned:", text)
    turned = run_markdown(replace(report, quantizer="JointQ W2 g128 half turned lambda=0.3"))
    assert "turned: codes and scales" in turned


def test_times_of_layers_that_were_reused_are_said_to_be_of_another_run(report):
    note = "seconds: of the earlier run that solved the layers; here they were reused."
    stages = [replace(stage, reused=True) if stage.name == "quantize" else stage for stage in report.stages]
    again = run_markdown(replace(report, stages=stages))
    assert (run_markdown(report).count(note), again.count(note)) == (0, 1)
    assert "without loading PyTorch; 2 of 5 stages were reused" in again
    assert "| quantize | reused |" in again


def test_notes_have_columns_of_their_own_and_those_alike_one_line(report):
    notes = [{"lambda": 0.3, "sweeps": 2 + layer.block % 2, "dead_columns": 0} for layer in report.layers]
    layers = [replace(layer, notes=note) for layer, note in zip(report.layers, notes, strict=True)]
    table = run_document(replace(report, layers=layers)).tables[-2]
    column = table.heading.index("sweeps")
    assert [row[column] for row in table.rows[6:8]] == ["2", "3"]
    assert "The same in all that have it: lambda=0.300." in table.note
    assert "lambda" not in table.heading
    assert "dead_columns" not in table.heading


def test_the_page_names_no_address_outside_itself(page):
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page
    assert "@import" not in page

    class References(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.found += [value for name, value in attrs if name in ("src", "href", "action", "data") and value]

    parser = References()
    parser.feed(page)
    assert parser.found
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in parser.found)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_a_picture_is_one_file_with_texts_and_needs_nothing_else(page):
    pictures = [b64decode(code).decode() for code in re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)]
    assert [set(re.findall(r">(E_y|E_w|error)<", picture)) for picture in pictures] == [{"E_y"}, {"E_w"}, {"error"}]
    for picture in pictures:
        assert not re.search(r'href="[^#]|url\([^#]', picture)


def test_a_layer_without_error_is_left_off_the_logarithmic_axis_and_the_caption_says_so(page):
    assert "1 point that no such axis can show left out" in page


@pytest.mark.parametrize("error", [0.0, math.nan, math.inf])
def test_a_page_without_any_error_that_can_be_drawn_is_still_a_page(report, error):
    layers = [replace(layer, output_error=error, weight_error=error) for layer in report.layers]
    blocks = [replace(block, output_error=error) for block in report.blocks]
    assert "<img " not in run_html(replace(report, layers=layers, blocks=blocks))


def test_a_run_of_one_layer_one_window_and_a_broken_model_is_still_a_page(report):
    broken = Perplexity(math.nan, math.nan, math.nan, math.nan)
    page = run_html(replace(report, layers=report.layers[:1], quantized=broken, stages=[]))
    ElementTree.fromstring(page)
    assert "perplexity is nan" in page


def test_more_kinds_than_colours_are_drawn_all_the_same(report):
    layers = [replace(layer, kind=f"kind_{index % 21}") for index, layer in enumerate(report.layers)]
    page = run_html(replace(report, layers=layers))
    assert all(re.search(f">kind_\u200b?{index}<", page) for index in range(21))


def test_the_form_is_that_of_the_record_or_bits_and_group(report):
    layers = [replace(report.layers[0], bits=None, group_size=None), replace(report.layers[1], label="W3 half")]
    heading, rows, _ = table_of(run_html(replace(report, layers=[*layers, *report.layers[2:]])), "Layers")
    assert [row[heading.index("form")] for row in rows[:3]] == ["", "W3 half", "W4 g64"]


def test_names_from_outside_cannot_become_markup(report):
    page = run_html(replace(report, model="<script>alert(1)</script>", warnings=["<b>"]))
    assert "<script>alert" not in page
    assert "<b>" not in page


def test_a_directory_that_has_become_a_file_is_a_resource_error(report, directory):
    directory.path.rmdir()
    directory.path.write_text("")
    with pytest.raises(ResourceError):
        write_report(report, directory)


def test_generated_texts_are_shown_and_are_no_markup(report, directory):
    texts = [Generation("Once", " <b>upon</b>\na | time", " `again`")]
    shown = replace(report, generations=texts)
    write_report(shown, directory)
    assert load_report(directory.report_json).generations == texts
    markdown = directory.report_markdown.read_text(encoding="utf-8")
    assert r'| "Once" | " &lt;b>upon&lt;/b>\na \| time" | " `again`" |' in markdown
    assert " &lt;b&gt;upon&lt;/b&gt;\na | time</td>" in directory.report_html.read_text(encoding="utf-8")
    assert "Generated" not in run_markdown(report)
