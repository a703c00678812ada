"""A sweep from its command to the summary, on tiny models."""

import json
from pathlib import Path

import pytest
from tiny_models import write_checkpoint

from jointq_cli.cli.main import main

WORDS = [
    "evaluation.seqlen=32", "evaluation.max_windows=4", "runtime.batch_tokens=64", "output_dir=out",
    "hydra.sweep.dir=out/sweep",
]  # fmt: skip


def test_evaluations_show_warnings_and_progress_in_a_file_and_keep_warnings_in_reports_and_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "a", "llama_tied")
    both = write_checkpoint(tmp_path / "b", shard="100KB")
    (write_checkpoint(tmp_path / "one") / "model.safetensors").rename(both / "model.safetensors")
    assert main(["evaluate", "-m", "model.path=a,b", "reference=a", *WORDS]) == 0
    out = capfd.readouterr().out.splitlines()
    short = "evaluation.max_windows: only 124 tokens are scored"
    for number in (0, 1):
        assert [line for line in out if line.startswith(f"warning: job {number}: {short}")]
        assert [line for line in out if line.startswith(f"job {number}: score ")]
    kept = [json.loads(Path(f"out/sweep/{number}/evaluation.json").read_text())["warnings"] for number in (0, 1)]
    assert [[text.split(";")[0] for text in texts] for texts in kept] == [
        [f"{short}, and perplexity needs some 4000"],
        ["b: has both model.safetensors and model.safetensors.index.json", f"{short}, and perplexity needs some 4000"],
    ]
    summary = Path("out/sweep/summary.md").read_text()
    assert summary.count(short) == 1
    assert f"> **Warning:** both jobs: {short}" in summary
    assert "> **Warning:** job 1: b: has both" in summary
    assert "Least KL divergence in job 1 (path=b)" in out[-2]
    assert "not ranked: job 0, the reference itself" in summary
