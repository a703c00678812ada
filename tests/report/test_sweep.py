"""A sweep as rows, tables, files and figures, from records as jobs write them. No model is loaded."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from jointq_cli.cli.main import main
from jointq_cli.errors import Interrupted, JointqError, NumericsError
from jointq_cli.records import Comparison, Coverage, EvaluationReport, RunReport, TaskRecord
from jointq_cli.report import Console, encode
from jointq_cli.report.comparison import ComparedRun, RunComparison
from jointq_cli.report.figures.comparison import sweep_figures
from jointq_cli.report.pages.sweep import write_summary
from jointq_cli.report.run_files import load_jobs, load_runs
from jointq_cli.report.tables.comparison import comparison_document, job_line
from jointq_cli.report.tables.table import TableDocument
from jointq_cli.system.sweep_directory import (
    DONE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    WAITING,
    JobRecord,
    SweepDirectory,
    SweepPlan,
    attempt,
    load_job,
)

SVG_TEXT = "{http://www.w3.org/2000/svg}text"
KEY = "quantizer.regularization_lambda"
LAMBDAS = ("0.01", "0.1", "1.0", "10.0")


def measured(report: RunReport, perplexity: float, divergence: float | None = None) -> RunReport:
    """divergence: if None, it rises with the perplexity."""
    divergence = perplexity / 100 if divergence is None else divergence
    increase = math.log(perplexity / report.original.value)
    compared = replace(report.comparison, kl_divergence=divergence, kl_divergence_standard_error=0.001)
    return replace(
        report,
        quantized=replace(report.quantized, value=perplexity),
        comparison=replace(compared, nll_increase=increase),
    )


def jobs_of(directory: SweepDirectory) -> RunComparison:
    return RunComparison(load_jobs(directory), "job")


def document_of(directory: SweepDirectory) -> TableDocument:
    return comparison_document(jobs_of(directory))


def best_of(directory: SweepDirectory) -> ComparedRun | None:
    return jobs_of(directory).ranking.best


def write_job(directory: SweepDirectory, number: int, report: RunReport) -> None:
    (directory.run(number) / "report.json").write_text(encode(report), encoding="utf-8")


def sweep_of(
    place: Path, report: RunReport, perplexities: Sequence[float | None], settings: Sequence[dict[str, str]]
) -> SweepDirectory:
    """None: a job that has not begun."""
    directory = SweepDirectory(place)
    directory.begin(SweepPlan("mine", ["jointq", "quantize", "-m"], list(settings), ["key"] * len(settings)))
    for number, perplexity in enumerate(perplexities):
        if perplexity is not None:
            run = directory.run(number)
            run.mkdir()
            write_job(directory, number, measured(report, perplexity))
            (run / "recipe.yaml").write_text("# @package _global_\nname: mine\n", encoding="utf-8")
            (run / "job.json").write_text(json.dumps(asdict(JobRecord(DONE, "key", 12.0))), encoding="utf-8")
    return directory


@pytest.fixture
def half_done(tmp_path: Path, report: RunReport) -> SweepDirectory:
    """Job 0 done, job 1 done and best, job 2 failed, job 3 has not begun."""
    directory = sweep_of(tmp_path / "sweep", report, [14.0, 13.5, 13.0, None], [{KEY: value} for value in LAMBDAS])
    (directory.run(2) / "job.json").write_text(json.dumps(asdict(JobRecord(FAILED, "key", 2.0, "layer x: NaN"))))
    return directory


def test_the_report_of_a_failed_job_is_that_of_an_earlier_attempt_and_does_not_count(half_done: SweepDirectory) -> None:
    jobs = load_jobs(half_done)
    assert [job.record.state for job in jobs] == [DONE, DONE, FAILED, WAITING]
    assert jobs[2].report is None
    chosen = best_of(half_done)
    assert chosen is not None
    assert chosen.name == "1"


def test_rows_have_the_bits_of_the_complete_checkpoint(tmp_path: Path, report: RunReport) -> None:
    partly = replace(report, coverage=Coverage(0.4, {"mlp.experts": 0.6}, 11.2, 12.1))
    directory = sweep_of(tmp_path, partly, [14.0], [{KEY: "1"}])
    [table, *_] = document_of(directory).shown
    assert table.rows[0][table.heading.index("bits/model")] == "12.1"
    write_summary(directory, page=False)
    [row] = json.loads((tmp_path / "summary.json").read_text())
    assert (row["bits_per_block_weight"], row["bits_per_parameter"]) == (11.2, 12.1)


def test_tasks_have_their_columns(tmp_path: Path, report: RunReport, task: TaskRecord) -> None:
    directory = sweep_of(tmp_path, replace(report, tasks=[task]), [14.0, None], [{KEY: "1"}, {KEY: "2"}])
    [table, *_] = document_of(directory).shown
    assert [row[table.heading.index("arc_easy acc")] for row in table.rows] == ["0.620 ± 0.010", "-"]
    write_summary(directory, page=False)
    [first, second] = json.loads((tmp_path / "summary.json").read_text())
    assert (first["arc_easy acc"], first["arc_easy acc_standard_error"]) == (0.62, 0.01)
    assert "arc_easy acc" not in second


def test_nothing_is_best_where_nothing_was_measured(tmp_path: Path, report: RunReport) -> None:
    sweep = sweep_of(tmp_path, report, [None, math.inf], [{}, {}])
    assert best_of(sweep) is None
    assert "No perplexity to compare" in document_of(sweep).headline
    assert sweep_figures(jobs_of(sweep)) == []


def test_no_job_is_best_among_jobs_measured_otherwise(tmp_path: Path, report: RunReport) -> None:
    directory = sweep_of(tmp_path, report, [14.0, 1.0], [{KEY: "1"}, {KEY: "2"}])
    other = replace(measured(report, 1.0), protocol=replace(report.protocol, window=7))
    write_job(directory, 1, other)
    assert best_of(directory) is None
    assert "These jobs do not compare: they differ in window." in document_of(directory).headline
    write_summary(directory, page=False)
    assert not (tmp_path / "recipe" / "best.yaml").exists()


def test_no_job_is_best_among_several_models(tmp_path: Path, report: RunReport) -> None:
    directory = sweep_of(tmp_path, report, [14.0, 13.0, 12.0], [{KEY: value} for value in "123"])
    other = replace(measured(report, 12.0), model_hash="another")
    write_job(directory, 2, other)
    assert best_of(directory) is None
    assert "they differ in model." in document_of(directory).headline
    assert not any("least KL" in figure.svg for figure in sweep_figures(jobs_of(directory)))


def test_the_best_job_has_the_least_kl_divergence_and_names_those_within_the_standard_errors(
    tmp_path: Path, report: RunReport
) -> None:
    directory = sweep_of(tmp_path, report, [13.0, 14.0, 14.5, 12.0], [{KEY: value} for value in LAMBDAS])
    for number, divergence in enumerate((0.0219, 0.0200, 0.0221, 0.0301)):
        write_job(directory, number, measured(report, 14 - number, divergence))
    document = document_of(directory)
    assert (
        "Least KL divergence in job 1 (regularization_lambda=0.1): 0.0200 ± 0.0010, perplexity 13" in document.headline
    )
    assert document.headline.endswith(
        "it: job 0 (within the sum of both standard errors, an upper bound of the paired one)."
    )
    marks = {row[0]: [cell[-1] for cell in row if cell[-1] in "*~"] for row in document.shown[0].rows}
    assert marks == {"0": ["~"], "1": ["*"], "2": [], "3": []}
    assert all("least KL divergence" in figure.svg for figure in sweep_figures(jobs_of(directory)))
    write_summary(directory, page=False)
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["best"] for row in rows] == [False, True, False, False]
    assert [row["not_distinguishable_from_best"] for row in rows] == [True, False, False, False]
    assert {row["ranked_by"] for row in rows} == {"kl"}
    assert "job 1" in (tmp_path / "recipe" / "best.yaml").read_text()


def test_a_single_window_distinguishes_no_jobs(tmp_path: Path, report: RunReport) -> None:
    once = replace(report, protocol=replace(report.protocol, windows=1))
    sweep = sweep_of(tmp_path, once, [14.0, 99.0], [{KEY: "1"}, {KEY: "2"}])
    assert "from it: job 1 (a single window gives no standard error)." in document_of(sweep).headline


def test_a_job_that_has_ended_is_a_line_with_its_settings_and_figures_or_its_error(half_done: SweepDirectory) -> None:
    lines = [job_line(job, "bits=4", 8) for job in load_jobs(half_done)]
    assert lines[0].startswith(
        "  0  bits=4    perplexity 14.00 ± 0.55  increase -23.38 ± 0.22 %  KL divergence 0.1400 ± "
    )
    assert lines[0].endswith("time 4 min 23 s")
    assert lines[2].endswith("failed: layer x: NaN")
    assert lines[3].endswith("waiting: no result")


def test_the_summary_has_every_job_and_full_precision(half_done: SweepDirectory) -> None:
    write_summary(half_done, page=True)
    table = json.loads((half_done.path / "summary.json").read_text())
    assert [row[KEY] for row in table] == list(LAMBDAS)
    assert [row.get("perplexity") for row in table] == [14.0, 13.5, None, None]
    with (half_done.path / "summary.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == [DONE, DONE, FAILED, WAITING]
    assert "2 of 4 jobs done. Least KL divergence in job 1" in (half_done.path / "summary.md").read_text()
    assert "layer x: NaN" in (half_done.path / "summary.html").read_text()


def test_the_best_job_is_a_recipe_that_keeps_hydras_first_line(half_done: SweepDirectory) -> None:
    write_summary(half_done, page=False)
    lines = (half_done.path / "recipe" / "best.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert "job 1" in lines[1]
    assert lines[-1] == "name: mine"


def test_a_curve_has_the_swept_values_below_and_a_line_for_every_mix_of_the_others(
    tmp_path: Path, report: RunReport
) -> None:
    settings = [{"quantizer.bits": bits, KEY: value} for bits in "43" for value in LAMBDAS]
    figures = sweep_figures(jobs_of(sweep_of(tmp_path, report, [14, 13, 12, 13, 24, 23, 22, 23], settings)))
    assert [figure.title for figure in figures] == [
        "Perplexity over regularization_lambda",
        "KL divergence over regularization_lambda",
    ]
    for figure in figures:
        texts = ["".join(element.itertext()) for element in ElementTree.fromstring(figure.svg).iter(SVG_TEXT)]
        assert {"0.01", "0.1", "1", "10", "bits=4", "bits=3"} <= set(texts)


def test_the_page_of_200_jobs_is_small_and_has_them_all(tmp_path: Path, report: RunReport) -> None:
    settings = [{"quantizer.bits": str(bits), KEY: str(0.01 * step)} for bits in range(1, 9) for step in range(1, 26)]
    directory = sweep_of(tmp_path, replace(report, layers=[], blocks=[]), [15 - n / 100 for n in range(200)], settings)
    write_summary(directory, page=True)
    page = (tmp_path / "summary.html").read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    assert page.count('<td data-label="job"') == 200
    assert page.count("<img ") == 2


def evaluations(
    place: Path, report: RunReport, perplexities: Sequence[float], divergences: Sequence[float | None]
) -> SweepDirectory:
    """A sweep over checkpoints named 0, 1, ...; a divergence is from checkpoint 0, None without a reference."""
    directory = sweep_of(place, report, perplexities, [{"model.path": str(n)} for n in range(len(perplexities))])
    for number, (perplexity, divergence) in enumerate(zip(perplexities, divergences, strict=True)):
        (directory.run(number) / "report.json").unlink()
        found = EvaluationReport(
            model=str(number),
            model_hash=f"of {perplexity}",
            reference=None if divergence is None else "0",
            protocol=report.protocol,
            perplexity=replace(report.quantized, value=perplexity),
            comparison=None
            if divergence is None
            else Comparison(math.log(perplexity / perplexities[0]), 0.001, divergence, 0.001, 0.9),
            stages=[],
            versions={},
            warnings=["few tokens"],
        )
        (directory.run(number) / "evaluation.json").write_text(encode(found), encoding="utf-8")
    return directory


def test_a_sweep_of_evaluations_does_not_rank_the_reference_itself(tmp_path: Path, report: RunReport) -> None:
    directory = evaluations(tmp_path, report, [12.0, 18.0, 17.0], [0.0, 0.1, 0.2])
    write_summary(directory, page=True)
    table = json.loads((tmp_path / "summary.json").read_text())
    assert [row["perplexity"] for row in table] == [12.0, 18.0, 17.0]
    assert table[1]["perplexity_increase"] == pytest.approx(0.5)
    document = document_of(directory)
    assert "Least KL divergence in job 1 (path=1)" in document.headline
    assert "+50.0" in document.headline
    assert "not ranked: job 0, the reference itself" in document.notes
    assert document.warnings == ["all 3 jobs: few tokens"]
    assert len(sweep_figures(jobs_of(directory))) == 2
    assert not (tmp_path / "recipe" / "best.yaml").exists()


def test_evaluations_without_a_reference_rank_by_perplexity(tmp_path: Path, report: RunReport) -> None:
    sweep = evaluations(tmp_path, report, [18.0, 12.0, 12.5], [None] * 3)
    document = document_of(sweep)
    assert document.headline.startswith(
        "Least perplexity in job 1 (path=1): 12.00 ± 0.55. Not distinguishable from it: job 2 "
    )
    [figure] = sweep_figures(jobs_of(sweep))
    assert "least perplexity" in figure.svg


def test_an_engine_without_logits_leaves_perplexity_to_rank_by(tmp_path: Path, report: RunReport) -> None:
    sweep = evaluations(tmp_path, report, [18.0, 12.0, 15.0], [0.1, math.nan, 0.2])
    document = document_of(sweep)
    assert "Least perplexity in job 1 (path=1): 12.00 ± 0.55 (-33" in document.headline
    assert not [cell for row in document.shown[0].rows for cell in row if "nan" in cell]
    assert len(sweep_figures(jobs_of(sweep))) == 1


def test_only_the_reference_itself_is_nothing_to_rank(tmp_path: Path, report: RunReport) -> None:
    assert document_of(evaluations(tmp_path, report, [12.0], [0.0])).headline == "No KL divergence to compare."


def test_two_values_make_no_curve(tmp_path: Path, report: RunReport) -> None:
    assert sweep_figures(jobs_of(sweep_of(tmp_path, report, [14, 13], [{KEY: "1"}, {KEY: "2"}]))) == []


def test_a_half_done_sweep_can_be_reported(half_done: SweepDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(half_done.path)]) == 0
    assert "2 of 4 jobs done" in capsys.readouterr().out
    assert main(["report", str(half_done.path), "--html"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_a_damaged_plan_is_reported(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(JointqError, match=r"sweep\.json: not the plan of a sweep"):
        SweepDirectory(tmp_path).plan()


# --- how a job ends


def failing(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "state"), [(NumericsError("x"), FAILED), (Interrupted("stop"), INTERRUPTED), (ValueError("x"), FAILED)]
)
def test_an_attempt_that_fails_is_recorded_and_repeated(tmp_path: Path, error: Exception, state: str) -> None:
    with pytest.raises(type(error)):
        attempt(tmp_path, "key", lambda: failing(error))
    assert load_job(tmp_path).state == state
    assert attempt(tmp_path, "key", lambda: None)
    assert not attempt(tmp_path, "key", lambda: failing(error))
    assert attempt(tmp_path, "another key", lambda: None)


def test_a_job_whose_process_is_gone_was_interrupted(tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path)
    directory.begin(SweepPlan("mine", [], [{}], ["key"]))
    seen: list[str] = []
    attempt(directory.run(0), "key", lambda: seen.append(directory.record(0).state))
    assert seen == [RUNNING]
    record = json.loads((directory.run(0) / "job.json").read_text())
    gone = record | {"state": RUNNING}
    (directory.run(0) / "job.json").write_text(json.dumps(gone))
    assert directory.record(0).state == INTERRUPTED
    assert attempt(directory.run(0), "key", lambda: None)


def test_a_job_json_that_is_cut_off_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"state": "do')
    assert load_job(tmp_path).state == WAITING
    assert attempt(tmp_path, "key", lambda: None)


def test_what_is_done_with_another_key_waits_to_be_run_again(half_done: SweepDirectory) -> None:
    plan = half_done.plan()
    half_done.begin(replace(plan, keys=["another", "key", "key", "key"]))
    assert [job.record.state for job in load_jobs(half_done)] == [WAITING, DONE, FAILED, WAITING]


def test_a_job_whose_report_was_deleted_runs_again(tmp_path: Path) -> None:
    def run() -> None:
        (tmp_path / "report.json").write_text("{}")

    assert attempt(tmp_path, "key", run)
    assert not attempt(tmp_path, "key", run)
    (tmp_path / "report.json").unlink()
    assert attempt(tmp_path, "key", run)


def test_a_best_recipe_does_not_outlive_its_job(half_done: SweepDirectory) -> None:
    write_summary(half_done, page=False)
    half_done.begin(replace(half_done.plan(), keys=["another"] * 4))
    write_summary(half_done, page=False)
    assert not (half_done.path / "recipe" / "best.yaml").exists()


def test_compare_leaves_out_what_the_sweep_does_not_call_done(half_done: SweepDirectory) -> None:
    found = load_runs([half_done.path])
    assert [run.name for run in found if run.report] == ["0", "1"]


@pytest.mark.parametrize("quiet", [False, True])  # True: in another process, whose output is a log of its own
def test_without_a_terminal_a_job_shows_its_warnings_and_progress(quiet: bool) -> None:
    stream = io.StringIO()
    with Console(quiet=quiet, brief="job 3", stream=stream) as console:
        console.header([("recipe", "mine")])
        with console.stage("quantize"), console.bar("block 0", 2) as bar:
            bar.advance(2)
        console.warn("few tokens")
        console.note("waiting for another process")
    shown = stream.getvalue()
    assert "job 3: block 0 2/2" in shown
    assert "warning: job 3: few tokens" in shown
    assert "job 3: waiting for another process" in shown
    assert "recipe" not in shown


def test_the_summary_lists_each_warning_and_error_once_with_its_jobs(
    tmp_path: Path, report: RunReport, troubled: RunReport
) -> None:
    directory = sweep_of(tmp_path, report, [14.0] * 5, [{KEY: value} for value in "12345"])
    for number in (0, 2):
        write_job(
            directory, number, measured(replace(troubled, warnings=[*troubled.warnings * 2, f"only {number}"]), 14)
        )
    for number in (3, 4):
        failed = asdict(JobRecord(FAILED, "key", 2.0, "disk full"))
        (directory.run(number) / "job.json").write_text(json.dumps(failed))
    assert document_of(directory).warnings == [
        "jobs 3, 4 failed: disk full",
        f"jobs 0, 2: {troubled.warnings[0]}",
        "job 0: only 0",
        "job 2: only 2",
    ]
