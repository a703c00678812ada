"""Exports in a run directory: which are left there, and what an interrupted export leaves."""

from pathlib import Path

import pytest
from tiny_models import write_checkpoint

from jointq_cli.cli.main import main
from jointq_cli.report import load_report
from jointq_cli.stages.export import link_exports


def test_a_run_without_exports_leaves_none_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "export" / "gguf").mkdir(parents=True)
    (tmp_path / "export" / ".DS_Store").touch()
    link_exports([], tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_an_export_whose_check_is_interrupted_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    model = write_checkpoint(tmp_path / "model")
    words = [
        "recipe=ci_smoke", f"model.path={model}", "quantizer=rtn", "quantizer.group_size=32", "qep=none",
        "calibration.num_samples=8", "calibration.seqlen=32", "evaluation.seqlen=32", "evaluation.max_windows=2",
        "generate_tokens=0", "hydra.run.dir=run",
    ]  # fmt: skip
    assert main(["quantize", *words]) == 0
    monkeypatch.setattr("jointq_cli.pipeline.is_checked", lambda *_: True)
    monkeypatch.setattr("jointq_cli.pipeline.check_finished", interrupt)
    assert main(["export", "run", "format=compressed-tensors"]) == 130
    assert (tmp_path / "run" / "export" / "compressed-tensors" / "README.md").is_file()
    assert [record.format for record in load_report(tmp_path / "run" / "report.json").exports] == ["compressed-tensors"]
