"""Limits of figures: in a recipe, and on the command line of `jointq check`."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import pytest

from jointq_cli.cli.main import main
from jointq_cli.errors import ConfigError, JointqError
from jointq_cli.records import Coverage, EvaluationReport, RunReport
from jointq_cli.report import encode
from jointq_cli.report.limits import Limits, beyond
from jointq_cli.report.measured import figures
from jointq_cli.report.summary import problems


def write_run(directory: Path, report: RunReport, recipe: str = "name: made\n") -> Path:
    (directory / "report.json").write_text(encode(report), encoding="utf-8")
    (directory / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return directory


def check(*words: str | Path) -> int:
    return main(["check", *map(str, words)])


def test_every_setting_is_a_figure_of_a_run(report: RunReport) -> None:
    complete = replace(report, coverage=Coverage(1.0, {}, 4.3, 6.0))
    assert {field.name for field in dataclasses.fields(Limits)} <= figures(complete).keys()


def test_more_is_better_only_for_agreement_and_coverage(report: RunReport) -> None:
    found = figures(report)  # kl 0.05127, top1_agreement 0.8871
    assert beyond(found, Limits(kl=0.052, top1_agreement=0.88).given) == []
    assert beyond(found, Limits(kl=0.051, top1_agreement=0.9, perplexity_increase=0.05).given) == [
        "perplexity_increase 5.838 %: above its limit of 5 %",
        "kl 0.05127: above its limit of 0.051",
        "top1_agreement 88.71 %: below its limit of 90 %",
    ]


def test_a_figure_that_is_no_number_is_beyond_every_limit(report: RunReport) -> None:
    broken = replace(report, comparison=replace(report.comparison, kl_divergence=math.nan, nll_increase=1e4))
    assert len(beyond(figures(broken), Limits(kl=1e9, perplexity_increase=1e9).given)) == 2


def test_a_limit_breaks_its_rule_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"limits\.top1_agreement=95\.0: must be from 0 to 1, or null for none"):
        Limits(top1_agreement=95.0)


def test_a_run_beyond_its_limits_has_a_problem(report: RunReport) -> None:
    assert problems(replace(report, beyond_limits=["kl 1: above its limit of 0.5"])) == ["kl 1: above its limit of 0.5"]


def test_the_exit_code_says_whether_typed_limits_hold(
    report: RunReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, report)
    assert check(run, "--max", "kl=0.06", "--max", "perplexity_increase=6%", "--min", "top1_agreement=0.8") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert check("--max", "kl=0.05", "--max", "perplexity=19", "--max", "bits_per_weight=5", run) == 1
    assert capsys.readouterr().out.splitlines() == [
        "kl 0.05127: above its limit of 0.05",
        "perplexity 19.34: above its limit of 19",
    ]


def test_without_any_limit_those_of_the_recipe_count(
    report: RunReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, report, "defaults:\n- limits: none\nlimits:\n  kl: 0.05\n  perplexity: null\n")
    assert check(run) == 1
    assert capsys.readouterr().out == "kl 0.05127: above its limit of 0.05\n"
    assert check(run, "--max", "perplexity=100") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "recipe.yaml: sets no limits; name some: --max kl=0.02"),
        (["--max", "kll=1"], "kll: no figure of this report; it has perplexity, perplexity_increase, nll_increase, kl"),
        (["--max", "kl"], "kl: must be FIGURE=NUMBER"),
        (["--max", "kl=nan"], "kl=nan: must be FIGURE=NUMBER"),
        (["--min", "coverage=90%"], "coverage: no figure of this report"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    report: RunReport, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert check(write_run(tmp_path, report), *words) == 1
    found = capsys.readouterr().err
    assert message in found
    assert found.count("\n") == 1


def test_an_evaluation_has_the_figures_of_its_reference(report: RunReport, tmp_path: Path) -> None:
    evaluation = EvaluationReport(
        model="a", model_hash="b", reference="c", protocol=report.protocol, perplexity=report.quantized,
        comparison=report.comparison, stages=[], versions={},
    )  # fmt: skip
    (tmp_path / "evaluation.json").write_text(encode(evaluation), encoding="utf-8")
    assert check(tmp_path, "--max", "kl=0.06") == 0
    assert check(tmp_path, "--max", "kl=0.05") == 1
    with pytest.raises(JointqError, match=r"it has perplexity$"):
        beyond(figures(replace(evaluation, comparison=None)), Limits(kl=1.0).given)


def test_a_directory_without_a_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "--max", "kl=1") == 1
    assert "has neither report.json nor evaluation.json" in capsys.readouterr().err


def test_an_upper_limit_of_what_cannot_be_too_much_is_refused(
    report: RunReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(write_run(tmp_path, report), "--max", "top1_agreement=99%") == 1
    assert "of this figure more is better; --min top1_agreement=" in capsys.readouterr().err
    assert check(write_run(tmp_path, report), "--min", "kl=1") == 1
    assert "of this figure less is better; --max kl=" in capsys.readouterr().err
