"""Comparison of several runs: what differs is reported, and results of different protocols are not ranked."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jointq_cli import __version__
from jointq_cli.cli.main import main
from jointq_cli.records import Coverage, EvaluationReport, RunReport, StageRecord, TaskRecord
from jointq_cli.report import Console, encode
from jointq_cli.report.comparison import ComparedRun, RunComparison
from jointq_cli.report.figures.comparison import comparison_figures
from jointq_cli.report.pages.documents import comparison_html, document_markdown
from jointq_cli.report.run_files import load_runs
from jointq_cli.report.tables.comparison import comparison_document
from jointq_cli.report.tables.table import BEST_MARK, TableDocument, TextTable

SETTINGS = {
    "name": "mine",
    "quantizer": "gptq",
    "quantizer.bits": "4",
    "quantizer.damping": "0.01",
    "evaluation.seqlen": "512",
}
RECIPE = {
    "defaults": [{"override /quantizer": "gptq"}, {"override /qep": "none"}],
    "name": "mine",
    "quantizer": {"bits": 4, "gptq": {"damping": 0.01}, "lambda_list": [0.1, 0.2], "seed": None},
    "qep": {},
}


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def scaled(report: RunReport, factor: float) -> RunReport:
    """The same run with all its errors so many times as large."""
    return replace(
        report,
        layers=[replace(layer, output_error=factor * layer.output_error) for layer in report.layers],
        blocks=[replace(block, output_error=factor * block.output_error) for block in report.blocks],
        comparison=replace(report.comparison, kl_divergence=factor * report.comparison.kl_divergence),
        quantized=replace(report.quantized, value=report.quantized.value + factor),
    )


def test_bits_are_those_of_the_layers_of_the_blocks_and_of_the_checkpoint(report: RunReport) -> None:
    partly = replace(report, coverage=Coverage(0.4, {"mlp.experts": 0.6}, 11.2, 12.1))
    runs = [run_of(report, "0"), run_of(partly, "1")]
    [table, *_] = comparison_document(RunComparison(runs)).shown
    bits = [
        [row[number] for row in table.rows]
        for number in map(table.heading.index, ("bits/weight", "bits/block", "bits/model"))
    ]
    assert bits == [["4.31", "4.31"], ["-", "11.2"], ["-", "12.1"]]


def run_of(report: RunReport, called: str = "0", /, **settings: str) -> ComparedRun:
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return ComparedRun(called, SETTINGS | changed, report)


def test_tasks_are_a_table_and_compare_only_with_the_same_samples(report: RunReport, task: TaskRecord) -> None:
    with_task = replace(report, tasks=[task])
    document = document_of([run_of(with_task, "0"), run_of(report, "1")])
    [table] = [table for table in document.shown if "arc_easy acc" in table.heading]
    column, change = (table.heading.index(name) for name in ("arc_easy acc", "change of arc_easy acc"))
    assert [row[column] for row in table.rows] == ["0.620 ± 0.010", "-"]
    assert [row[change] for row in table.rows] == ["-0.0050 ± 0.0040", "-"]
    assert document.warnings == []
    other = replace(report, tasks=[replace(task, task_hash="another")])
    assert document_of([run_of(with_task, "0"), run_of(other, "1")]).warnings == [
        "task arc_easy: 4f0c2d9be1a73568 in run 0; another in run 1"
    ]


@pytest.fixture(scope="session")
def three(report) -> list[ComparedRun]:
    return [
        run_of(report, "0"),
        run_of(scaled(report, 4), "1", quantizer__bits="3"),
        run_of(scaled(report, 16), "2", quantizer__bits="2"),
    ]


def document_of(runs: list[ComparedRun]) -> TableDocument:
    return comparison_document(RunComparison(runs))


# --- settings


def test_only_settings_that_differ_are_reported(three):
    assert RunComparison(three).keys == ["quantizer.bits"]
    assert [row[1] for row in document_of(three).shown[0].rows] == ["4", "3", "2"]


def test_names_and_places_differ_only_where_nothing_else_does(report):
    alike = [run_of(report, "a"), run_of(report, "b", name="other")]
    assert RunComparison(alike).keys == ["name"]
    unlike = [alike[0], run_of(report, "b", name="other", quantizer__bits="3")]
    assert RunComparison(unlike).keys == ["quantizer.bits"]


def test_what_another_option_of_a_group_does_not_have_is_no_difference_of_its_own(report):
    rtn = run_of(report, "rtn")
    rtn = replace(rtn, settings={key: value for key, value in SETTINGS.items() if "damping" not in key})
    other = replace(rtn, settings=rtn.settings | {"quantizer": "rtn"})
    assert RunComparison([run_of(report), other]).keys == ["quantizer"]
    # With the same option the key is missing for another reason, such as an older version.
    assert RunComparison([run_of(report), rtn]).keys == ["quantizer.damping"]


def test_what_older_runs_lack_and_later_ones_do_not_use_is_no_difference(report):
    later = run_of(report, "new", curvature="none", export="null", seed="7")
    assert RunComparison([run_of(report, "old"), later]).keys == ["seed"]


def test_a_key_that_differs_among_those_that_have_it_is_reported_whatever_the_option(report):
    other = ComparedRun("rtn", {"quantizer": "rtn"} | {"quantizer.bits": "4"}, report)
    runs = [run_of(report), run_of(report, quantizer__damping="0.1"), other]
    assert "quantizer.damping" in RunComparison(runs).keys


def test_headings_are_as_short_as_they_can_be_and_still_apart(report):
    changed = {"evaluation__seqlen": "256", "calibration__seqlen": "128", "quantizer__bits": "2"}
    runs = [run_of(report, calibration__seqlen="512"), run_of(report, "1", **changed)]
    heading = document_of(runs).shown[0].heading
    assert {"bits", "evaluation.seqlen", "calibration.seqlen"} <= set(heading)
    assert RunComparison(runs).label(runs[1]).startswith("1 (bits=2, evaluation.seqlen=256")


def test_labels_leave_out_what_older_runs_lack_and_later_ones_do_not_use(report):
    older, later = run_of(report, "old"), run_of(report, "new", quantizer__bits="3", curvature="none", seed="7")
    labels = list(map(RunComparison([older, later]).label, (older, later)))
    assert labels == ["old (bits=4)", "new (bits=3, seed=7)"]


def test_of_many_runs_no_layers_are_shown(report):
    runs = [run_of(scaled(report, factor), str(factor)) for factor in range(1, 18)]
    assert [len(document_of(some).shown) for some in (runs, runs[:16])] == [1, 2]


# --- what compares


def best_of(*runs: ComparedRun) -> str | None:
    best = RunComparison(runs).ranking.best
    return best and best.name


def test_runs_of_one_protocol_and_one_model_compare(three):
    assert RunComparison(three).unlike == {}
    assert best_of(*three) == "0"


@pytest.mark.parametrize("part", ["dataset", "text_hash", "window", "bos", "windows", "scored_tokens"])
def test_every_part_of_the_protocol_keeps_runs_from_comparing(report, part):
    value = getattr(report.protocol, part)
    changed = value + 1 if isinstance(value, int) else value + "x"
    other = replace(report, protocol=replace(report.protocol, **{part: changed}))
    document = document_of([run_of(report, "0"), run_of(other, "1")])
    assert document.headline == f"These runs do not compare: they differ in {part}."
    assert document.warnings == [f"{part}: {value} in run 0; {changed} in run 1"]
    assert not any(cell.endswith(BEST_MARK) for row in document.shown[0].rows for cell in row)


def test_different_models_do_not_compare_even_under_one_name(report):
    document = document_of([run_of(report, "0"), run_of(replace(report, model_hash="ffff"), "1")])
    assert document.headline.endswith("differ in model.")
    assert "ffff in run 1" in document.warnings[0]


def test_where_a_divergence_is_no_number_perplexity_ranks(report):
    broken = replace(report, comparison=replace(report.comparison, kl_divergence=math.nan))
    assert RunComparison([run_of(broken, "0"), run_of(report, "1")]).ranking.figure == "perplexity"
    infinite = replace(broken, quantized=replace(report.quantized, value=math.nan))
    assert best_of(run_of(infinite, "0"), run_of(report, "1")) == "1"
    assert best_of(run_of(infinite, "0")) is None


def test_evaluations_stand_beside_the_runs_that_they_are_of(report):
    """What evaluations have no setting for is no difference, and the original is known by its hash or its name."""
    of_checkpoint = EvaluationReport(
        model="runs/a/checkpoint",
        model_hash="eeee",
        reference=report.model,
        protocol=report.protocol,
        perplexity=report.quantized,
        comparison=report.comparison,
        stages=[StageRecord("score", 1.0, False, 0), StageRecord("evaluate reference", 0.1, True, 0)],
        versions={},
    )
    of_original = replace(of_checkpoint, model=report.model, model_hash=report.model_hash, reference=None)
    evaluated = [
        ComparedRun(name, {"model.path": each.model, "evaluation.seqlen": "512"}, each)
        for name, each in (("e", of_checkpoint), ("o", replace(of_original, comparison=None)))
    ]
    runs = [run_of(report, "a"), run_of(scaled(report, 4), "b", quantizer__bits="3"), *evaluated]
    comparison, document = RunComparison(runs), document_of(runs)
    assert comparison.keys == ["quantizer.bits", "model.path"]
    assert document.headline.startswith("Least KL divergence in run a (bits=4): ")
    assert "not ranked: run o, the reference itself" in document.notes
    assert (
        "times leave out stages whose results were reused: 1 of 5 in runs a, b; 1 of 2 in runs e, o" in document.notes
    )
    assert [table.rows[-1][0] for table in document.shown] == ["o", "b"]
    assert "E_y by kind: medians over 210 layers that these runs have" in document.shown[1].title
    assert all(set(column) - {"", "-"} for table in document.shown for column in zip(*table.rows, strict=True))
    assert len(comparison_figures(comparison)) == 4
    assert document_of(evaluated).headline.startswith("Least perplexity in run e ")


def test_the_bits_of_the_best_run_are_named_where_runs_differ_in_them(report):
    runs = [run_of(report, "a"), run_of(replace(scaled(report, 4), bits_per_weight=2.28), "b", quantizer__bits="2")]
    assert " in run a (bits=4), with 4.31 bits per weight (runs have 2.28 to 4.31): " in document_of(runs).headline


# --- layers


def test_medians_scale_with_the_errors(three):
    for first, *others in RunComparison(three).kind_errors().values():
        assert others == pytest.approx([4 * first, 16 * first])


def test_layers_that_only_some_runs_have_are_left_out_of_the_medians(report):
    fewer = replace(report, layers=report.layers[:7], blocks=report.blocks[:1])
    comparison = RunComparison([run_of(report, "0"), run_of(fewer, "1")])
    assert all(first == second for first, second in comparison.kind_errors().values())
    assert "medians over 7 layers that all runs have" in document_of(list(comparison.runs)).shown[1].title


def test_models_without_a_common_layer_still_give_tables(report):
    layers = [replace(layer, name=f"x.{layer.name}") for layer in report.layers]
    other = run_of(replace(report, layers=layers, blocks=[], model_hash="ffff"), "1")
    document = document_of([run_of(report, "0"), other])
    assert len(document.shown) == 1
    ElementTree.fromstring(comparison_html(RunComparison([run_of(report, "0"), other]), document))


def test_errors_on_other_calibration_are_said_to_be_so(report):
    runs = [run_of(report, "0"), run_of(replace(report, calibration="c4"), "1")]
    assert any(note.startswith("calibration differs") for note in document_of(runs).notes)


# --- as text


@given(
    st.lists(st.lists(st.text("ab.", max_size=40), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(40, 200),
)
def test_a_folded_table_fits_where_its_cells_do_and_loses_no_column(texts, stub, width):
    heading = [f"head {index}" for index in range(4)]
    parts = TextTable("title", heading, texts, stub, note="note").folded(width)
    for part in parts:
        widths = [max(map(len, column)) for column in zip(part.heading, *part.rows, strict=True)]
        assert len(widths) == 2 or sum(widths) + 2 * (len(widths) - 1) <= width
    assert [text for part in parts for text in part.heading[1:]] == heading[1:]
    assert [part.note for part in parts] == [""] * (len(parts) - 1) + ["note"]


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_shows_every_figure_within_its_width(three, width):
    terminal = FakeTerminal()
    with Console(stream=terminal, width=width) as console:
        console.show(document_of(three))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for expected in ("0.0513 ± 0.0011 *", "18.27 ± 0.51", "+5.84 ± 0.31 %", "88.7 %", "4.31", "871 MB"):
        assert expected in text


def test_a_pipe_gets_a_row_per_run_and_no_control_codes(three):
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.show(document_of(three))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())
    assert len(re.findall(r"^2 +2 .*0\.8203 ± .*871 MB$", stream.getvalue(), re.MULTILINE)) == 1


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(three):
    text = document_markdown(document_of(three))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


# --- as a page


@pytest.fixture(scope="module")
def page(three) -> str:
    return comparison_html(RunComparison(three), document_of(three))


def test_the_page_is_well_formed_and_self_contained(page):
    ElementTree.fromstring(page)
    assert page.count("<img ") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert all(
        target.startswith("data:image/svg+xml;base64,") for target in re.findall(r'(?:href|src)="([^"]*)"', page)
    )


def test_a_page_of_broken_runs_draws_what_there_is(report):
    broken = replace(
        scaled(report, 0.0),
        quantized=replace(report.quantized, value=math.nan),
        comparison=replace(report.comparison, kl_divergence=math.nan),
    )
    runs = [run_of(broken, "0"), run_of(broken, "<1>")]
    page = comparison_html(RunComparison(runs), document_of(runs))
    ElementTree.fromstring(page)
    assert "<img" not in page


def test_a_perplexity_that_explodes_is_drawn_on_a_logarithmic_axis(report):
    broken = replace(report, quantized=replace(report.quantized, value=43_211.0))
    runs = [run_of(report, "0"), run_of(broken, "1")]
    assert ">10000<" in comparison_figures(RunComparison(runs))[0].svg


# --- the command


def write_run(directory: Path, report: RunReport, bits: int = 4) -> Path:
    directory.mkdir(parents=True)
    recipe = RECIPE | {"quantizer": RECIPE["quantizer"] | {"bits": bits}}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (directory / "report.json").write_text(encode(report), encoding="utf-8")
    return directory


@pytest.fixture
def sweep(report, tmp_path, monkeypatch) -> Path:
    """Eleven runs, of which the one with number 1 did not finish."""
    monkeypatch.chdir(tmp_path)
    for number in range(11):
        write_run(Path("sweep") / str(number), report, bits=number % 8 + 1)
    Path("sweep/1/report.json").unlink()
    Path("sweep/multirun.yaml").write_text("")
    return Path("sweep")


def test_settings_are_the_options_and_the_dotted_keys(report, tmp_path):
    run, _ = load_runs([write_run(tmp_path / name, report) for name in "ab"])
    assert run.settings == {
        "name": "mine",
        "quantizer": "gptq",
        "quantizer.bits": "4",
        "quantizer.gptq.damping": "0.01",
        "quantizer.lambda_list": "[0.1, 0.2]",
        "quantizer.seed": "null",
        "qep": "none",
    }


def test_a_sweep_stands_for_its_runs_in_the_order_of_their_numbers(sweep, capsys):
    assert [int(run.name) for run in load_runs([sweep])] == list(range(11))
    assert main(["compare", str(sweep)]) == 0
    assert "without a result: run 1\n" in capsys.readouterr().out


def test_runs_and_sweeps_mix_and_none_counts_twice(sweep, report):
    alone = write_run(Path("alone"), report)
    found = load_runs([alone, sweep, sweep / "3"])
    assert [run.name for run in found] == ["alone", *map(str, range(11))]


def test_runs_of_the_same_name_are_called_by_more_of_their_path(report, tmp_path):
    paths = [write_run(tmp_path / sweep / "0", report) for sweep in ("a", "b")]
    assert [run.name for run in load_runs(paths)] == ["a/0", "b/0"]


def refused(arguments: list[str], capsys) -> str:
    assert main(["compare", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_compared_is_one_line_with_its_path(sweep, report, capsys):
    write_run(Path("alone"), report)
    for directory in ("empty/0", "bare"):
        Path(directory).mkdir(parents=True)
    for arguments, message in (
        (["alone"], "alone: one finished run alone; name at least two, or a sweep"),
        (["alone", "alone"], "alone: one finished run alone"),
        (["alone", "sweep/1"], "sweep/1: neither a finished run"),
        (["alone", "bare"], "bare: neither a finished run"),
        (["empty"], "empty: no finished run; name at least two, or a sweep"),
        (["alone", "sweep", "--html", "nowhere/x.html"], "nowhere/x.html: there is no directory nowhere"),
    ):
        assert refused(arguments, capsys).startswith(f"error: {message}")


@pytest.mark.parametrize("content", ["- a", "a: [", "\x00"])
def test_a_run_with_a_damaged_recipe_is_left_out_with_its_path(sweep, content, capsys):
    (sweep / "3" / "recipe.yaml").write_text(content, encoding="utf-8")
    assert main(["compare", "--markdown", str(sweep)]) == 0
    assert "run 3 left out: sweep/3/recipe.yaml: not " in capsys.readouterr().out


def test_a_report_of_another_version_is_left_out_and_named_with_its_version(sweep, capsys):
    path = sweep / "3" / "report.json"
    path.write_text(json.dumps({"recipe": "x", "versions": {"jointq": "9.9"}}), encoding="utf-8")
    assert main(["compare", "--markdown", str(sweep)]) == 0
    out = capsys.readouterr().out
    assert f"run 3 left out: {path}: not readable by jointq {__version__} (jointq 9.9 wrote it)" in out
    others = [run for run in sweep.iterdir() if run.name.isdecimal() and run.name not in ("3", "0")]
    for run in others:
        (run / "report.json").write_text("{}", encoding="utf-8")
    assert refused([str(sweep)], capsys).startswith("error: sweep/")


@pytest.mark.parametrize(
    "arguments", [[], ["--markdown", "--html=x.html", "a"], ["--html", "--colour", "a"], ["--htm", "a", "b"]]
)
def test_wrong_usage_has_exit_code_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compare", *arguments])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["--html", "sweep/0", "sweep/2"], "compare.html"),
        (["sweep/0", "--html", "sweep/2"], "compare.html"),
        (["sweep/0", "sweep/2", "--html"], "compare.html"),
        (["sweep/0", "sweep/2", "--html", "page.html"], "page.html"),
    ],
)
def test_a_run_after_html_is_a_run_and_not_the_file(sweep, arguments, file, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "jointq_cli.report.figures.comparison.comparison_figures", lambda comparison: drawn.append(comparison) or []
    )
    assert main(["compare", *arguments]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert "2 runs of" in Path(file).read_text(encoding="utf-8")
    assert [run.name for run in drawn[0].runs] == ["0", "2"]
    assert not list(Path().glob(".*partial"))


def test_runs_within_the_errors_of_the_best_one_are_named(report: RunReport) -> None:
    error = report.comparison.kl_divergence_standard_error

    def shifted(errors: float) -> RunReport:
        value = report.comparison.kl_divergence + errors * error
        return replace(report, comparison=replace(report.comparison, kl_divergence=value))

    runs = [run_of(report, "0"), run_of(shifted(1.9), "1", a="1"), run_of(shifted(2.1), "2", a="2")]
    headline = document_of(runs).headline
    assert "Least KL divergence in run 0: 0.0513 ± 0.0011, perplexity 19.34 ± 0.55 (+5.84 ± 0.31 %). Not" in headline
    assert "Not distinguishable from it: run 1 (within the sum of both" in headline
