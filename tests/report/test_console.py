"""What the console writes to a terminal, to a pipe and to the log."""

import io
import logging
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from jointq_cli.errors import Interrupted, ResourceError
from jointq_cli.records import EvaluationReport, RunReport
from jointq_cli.report import Console
from jointq_cli.report.console.final_summary import evaluate_summary, quantize_summary


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report_run(console: Console, report: RunReport, clock) -> None:
    """A complete run, one second per layer."""
    with console:
        console.header([("recipe", report.recipe), ("protocol", report.protocol.line())])
        with console.stage("tokens") as stage:
            stage.is_reused = True
        with console.stage("quantize"), console.bar("quantising layers", len(report.layers)) as bar:
            for layer in report.layers:
                clock.sleep(1.0)
                console.layer(layer)
                bar.advance()
        console.note("a note with [brackets]")
        console.warn("a warning")
        console.show(quantize_summary(report, Path("outputs/run")))


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_pipe_gets_no_control_codes_and_no_carriage_returns(report, clock):
    stream = io.StringIO()
    report_run(Console(stream=stream, clock=clock), report, clock)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())


def test_a_pipe_stays_plain_when_colours_are_forced(report, clock, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    report_run(Console(stream=stream, clock=clock), report, clock)
    assert "\x1b" not in stream.getvalue()


def test_a_pipe_gets_a_progress_line_per_half_minute_and_at_the_end(report, clock):
    stream = io.StringIO()
    report_run(Console(stream=stream, clock=clock), report, clock)
    lines = re.findall(r"^quantising layers (\d+)/210", stream.getvalue(), re.MULTILINE)
    assert lines == [str(30 * step) for step in range(1, 8)]


def test_a_quick_phase_gets_one_line_and_a_slow_one_a_line_per_half_minute(clock):
    stream = io.StringIO()
    with Console(stream=stream, clock=clock) as console:
        with console.bar("quick", 100) as bar:
            for _ in range(100):
                clock.sleep(0.01)
                bar.advance()
        with console.bar("slow", 100) as bar:
            for _ in range(4):
                clock.sleep(31)
                bar.advance()
    assert stream.getvalue().count("quick ") == 1
    assert stream.getvalue().count("slow ") == 4
    assert "4/100, 4 %, 2 min 04 s, 49 min 36 s left" in stream.getvalue()


def test_what_an_earlier_run_has_finished_does_not_count_as_speed(clock):
    stream = io.StringIO()
    with Console(stream=stream, clock=clock) as console, console.bar("quantising", 20) as bar:
        bar.advance(10)
        clock.sleep(100)
        bar.advance()
    assert "11/20, 55 %, 1 min 40 s, 15 min 00 s left" in stream.getvalue()


def test_every_layer_is_a_row_with_its_verdict(troubled, clock):
    stream = io.StringIO()
    report_run(Console(stream=stream, clock=clock), troubled, clock)
    rows = [line for line in stream.getvalue().splitlines() if line.startswith("model.layers.")]
    assert len(rows) == len(troubled.layers)
    assert stream.getvalue().count("E_y, E_w: relative squared error of ") == 1
    assert "fallback" in rows[7]
    assert "not definite" in rows[7]
    assert "damped" in rows[20]


def test_a_stage_reports_its_seconds_or_that_it_was_reused(clock):
    stream = io.StringIO()
    with Console(stream=stream, clock=clock) as console:
        with console.stage("tokens") as reused:
            reused.is_reused = True
        with console.stage("evaluate") as slow:
            clock.sleep(12.34)
    assert "↺ tokens              reused\n" in stream.getvalue()
    assert "✓ evaluate            12.3 s\n" in stream.getvalue()
    assert reused.record().reused
    assert slow.record().seconds == pytest.approx(12.34)
    assert slow.record().peak_memory > 10**6


@pytest.mark.parametrize(("error", "word"), [(ValueError("x"), "failed"), (Interrupted("x"), "interrupted")])
def test_a_stage_that_does_not_end_well_says_so(clock, error, word):
    stream = io.StringIO()

    def work(console: Console) -> None:
        with console.stage("quantize"):
            clock.sleep(1)
            raise error

    with Console(stream=stream, clock=clock) as console, pytest.raises(type(error)):
        work(console)
    assert f"quantize            {word} after 1.00 s" in stream.getvalue()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_line_is_wider_than_the_terminal(troubled, clock, width):
    terminal = FakeTerminal()
    report_run(Console(stream=terminal, width=width, clock=clock), troubled, clock)
    assert max(map(len, re.split(r"[\r\n]", without_styles(terminal.getvalue())))) <= width


def test_eighty_columns_hold_a_complete_row_with_the_block_in_its_name(troubled, clock):
    terminal = FakeTerminal()
    report_run(Console(stream=terminal, width=80, clock=clock), troubled, clock)
    text = without_styles(terminal.getvalue())
    assert re.search(r"…12\.self_attn\.q_proj +576x576 +\S+e-\d +\S+e-\d +0\.01 +0\.\d\d  ok", text)


def test_forty_columns_cut_neither_verdicts_nor_figures(troubled, clock):
    terminal = FakeTerminal()
    report_run(Console(stream=terminal, width=40, clock=clock), troubled, clock)
    text = without_styles(terminal.getvalue())
    assert re.search(r"…1\.self_attn\.q_proj +\S+e-\d  fallback\n", text)
    for word in ("paired", "difference", "original 269 MB"):  # of what stands beside the figures
        assert word in text


def test_a_name_is_never_cut_when_there_is_room(report, clock):
    terminal = FakeTerminal()
    report_run(Console(stream=terminal, width=140, clock=clock), report, clock)
    assert "model.layers.12.self_attn.q_proj " in without_styles(terminal.getvalue())


def test_a_fallback_is_red_and_a_damped_layer_yellow(troubled, clock):
    terminal = FakeTerminal()
    report_run(Console(stream=terminal, width=80, clock=clock), troubled, clock)
    assert re.search(r"\x1b\[1;31m…1\.self_attn\.q_proj[^\x1b]*fallback", terminal.getvalue())
    assert re.search(r"\x1b\[33m…2\.mlp\.down_proj[^\x1b]*damped", terminal.getvalue())


def test_no_color_is_obeyed(troubled, clock, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = FakeTerminal()
    report_run(Console(stream=terminal, width=80, clock=clock), troubled, clock)
    assert "fallback" in terminal.getvalue()
    assert not re.search(r"\x1b\[(\d+;)*[349][0-7]", terminal.getvalue())


def test_a_dumb_terminal_is_treated_as_a_pipe(report, clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = FakeTerminal()
    report_run(Console(stream=terminal, clock=clock), report, clock)
    assert "\x1b" not in terminal.getvalue()


def test_the_terminals_cursor_comes_back_after_an_error(clock):
    terminal = FakeTerminal()

    def work() -> None:
        with Console(stream=terminal, width=80, clock=clock) as console:
            console.bar("never closed", 3).__enter__()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")


def test_brackets_are_text_and_no_markup(report, clock):
    terminal = FakeTerminal()
    report_run(Console(stream=terminal, width=80, clock=clock), report, clock)
    assert "a note with [brackets]" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [io.StringIO, FakeTerminal])
def test_the_closing_shows_every_figure_and_what_is_wrong(troubled, clock, terminal):
    stream = terminal()
    report_run(Console(stream=stream, width=110, clock=clock), troubled, clock)
    text = without_styles(stream.getvalue())
    for expected in (
        "19.34 ± 0.55",
        "18.27 ± 0.51",
        "+5.84 ± 0.31 %",
        "0.0513 ± 0.0011",
        "88.7 %",
        "4.31",
        "269 MB",
        "114 MB",
        "871 MB",
        "identical",
        "1 changed (model.norm.weight)",
        "1 layer fell back to RTN: model.layers.1.self_attn.q_proj",
        "jointq evaluate model.path=outputs/run/checkpoint",
    ):
        assert expected in text


@pytest.mark.parametrize("reference", ["pocket", None])
def test_an_evaluation_ends_with_its_perplexity_and_its_distance_from_a_reference(report, clock, reference):
    measured = EvaluationReport(
        model="runs/x/checkpoint",
        model_hash="5c1f",
        reference=reference,
        protocol=report.protocol,
        perplexity=report.quantized,
        comparison=report.comparison if reference else None,
        stages=report.stages[-1:],
        versions={},
    )
    stream = io.StringIO()
    with Console(stream=stream, clock=clock) as console:
        console.show(evaluate_summary(measured, Path("runs/y")))
    assert "perplexity 19.34 ± 0.55" in stream.getvalue()
    assert report.protocol.line() in stream.getvalue()
    assert ("KL divergence" in stream.getvalue()) is (reference is not None)


def test_a_quiet_console_says_nothing_and_still_counts(report, clock, capsys):
    report_run(Console(quiet=True, clock=clock), report, clock)
    assert capsys.readouterr() == ("", "")


def test_warnings_are_kept_for_the_report(report, clock):
    console = Console(quiet=True, clock=clock)
    report_run(console, report, clock)
    assert console.warnings == ["a warning"]


def test_the_log_has_everything_with_its_time(troubled, clock, tmp_path):
    report_run(Console(tmp_path / "log.txt", quiet=True, clock=clock), troubled, clock)
    entries = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  ", entry) for entry in entries)
    assert sum("model.layers." in entry and re.search(r"x(576|1536) ", entry) is not None for entry in entries) >= len(
        troubled.layers
    )
    assert any("warning: a warning" in entry for entry in entries)
    assert any("tokens              reused" in entry for entry in entries)
    assert any("19.34 ± 0.55" in entry for entry in entries)


def test_the_log_hears_libraries_once_and_only_while_it_is_open(tmp_path):
    log = tmp_path / "log.txt"
    private = logging.getLogger("transformers.modeling")
    with warnings.catch_warnings(), Console(log, quiet=True):
        warnings.simplefilter("always")
        logging.getLogger("numba.core").warning("from a library")
        private.warning("from a library with its own handler")
        logging.getLogger("numba.core").info("too quiet")
        warnings.warn("from Python", UserWarning, stacklevel=1)
    private.warning("too late")
    text = log.read_text(encoding="utf-8")
    assert text.count("WARNING numba.core: from a library\n") == 1
    assert text.count("from a library with its own handler") == 1
    assert "UserWarning: from Python" in text
    assert "too quiet" not in text
    assert "too late" not in text


def test_pythons_warnings_are_restored(tmp_path):
    before = warnings.showwarning
    with Console(tmp_path / "log.txt", quiet=True):
        pass
    assert warnings.showwarning is before


def test_a_line_is_in_the_log_at_once_and_a_continued_run_appends(tmp_path):
    log = tmp_path / "log.txt"
    for text in ("first", "second"):
        with Console(log, quiet=True) as console:
            console.note(text)
            assert text in log.read_text(encoding="utf-8")
    assert "first" in log.read_text(encoding="utf-8")


def test_the_log_ends_with_the_users_error_in_one_line_and_with_the_traceback_of_a_bug(tmp_path):
    for error in (ResourceError("the disk is full"), KeyError("ours")):
        with pytest.raises(type(error)), Console(tmp_path / "log.txt", quiet=True):
            raise error
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "ERROR the disk is full\n" in text
    assert text.count("Traceback") == 1
    assert "KeyError: 'ours'" in text


def test_a_log_that_cannot_be_written_is_one_line_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file.log\.txt"):
        Console(tmp_path / "file" / "log.txt", quiet=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_log_is_one_line(clock):
    with pytest.raises(ResourceError, match="full"), Console(Path("/dev/full"), quiet=True) as console:
        console.note("x")


def test_a_reader_that_leaves_does_not_end_the_run():
    program = (
        "from jointq_cli.cli import standard_streams\n"
        "from jointq_cli.report import Console\n"
        "import sys\n"
        "standard_streams.prepare()\n"
        "with Console() as console:\n"
        "    for _ in range(20000): console.note('x' * 50)\n"
        "sys.stderr.write('finished')\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr is not None
    assert run.stderr.read() == b"finished"
    run.stderr.close()
    assert run.wait() == 0


def test_matplotlib_and_jinja2_wait_until_they_are_needed():
    program = (
        "import io, sys\n"
        "from jointq_cli.report import Console, load_report, write_report\n"
        "with Console(stream=io.StringIO()) as console: console.note('x')\n"
        "assert not {'matplotlib', 'jinja2', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_layers_of_an_unknown_naming_keep_the_end_of_their_names(report, clock):
    terminal = FakeTerminal()
    odd = replace(report.layers[0], name="encoder_with_a_very_long_name_and_no_dots_at_all_in_it_q", block=3)
    with Console(stream=terminal, width=80, clock=clock) as console:
        console.layer(odd)
    assert "o_dots_at_all_in_it_q" in without_styles(terminal.getvalue())


def test_a_path_is_never_folded_and_is_relative_to_the_working_directory(report, clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = tmp_path / ("a directory with " + "a long name " * 9)
    terminal = FakeTerminal()
    with Console(stream=terminal, width=80, clock=clock) as console:
        console.show(quantize_summary(report, long))
    text = without_styles(terminal.getvalue())
    assert f"jointq evaluate 'model.path={long.name}/checkpoint'\n" in text
    assert f"  {long.name}/report.html\n" in text
