"""Exports of whole runs of a tiny model: planned, reused, added afterwards, read by `evaluate`, tried in engines."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint

from jointq_cli.cli.main import main
from jointq_cli.quantization.importance import load_importance

WORDS = [
    "recipe=ci_smoke", "model.path=model", "quantizer=rtn", "quantizer.group_size=32", "qep=none",
    "calibration.num_samples=4", "calibration.seqlen=32", "evaluation.seqlen=32", "evaluation.max_windows=4",
    "generate_tokens=0", "output_dir=out", "export=[compressed-tensors,gptq]",
]  # fmt: skip
RUN = Path("out/run")


def hashes(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.iterdir()) if path.name != "README.md"]  # which has measurements
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(run: Path) -> dict[str, dict[str, object]]:
    return {record["format"]: record for record in json.loads((run / "report.json").read_text())["exports"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run of WORDS."""
    directory = tmp_path_factory.mktemp("exports")
    write_checkpoint(directory / "model", "llama", dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert main(["quantize", *WORDS, f"hydra.run.dir={RUN}"]) == 0
    return directory


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_a_run_has_its_exports_complete_and_verified() -> None:
    found = records(RUN)
    assert set(found) == {"compressed-tensors", "gptq"}
    for name, record in found.items():
        assert record["worst_error"] == 0
        present = {path.name for path in (RUN / "export" / name).iterdir()}
        assert {"README.md", "config.json", "tokenizer.json", "model.safetensors.index.json"} <= present
    assert "vllm serve" in (RUN / "export" / "compressed-tensors" / "README.md").read_text()
    check = found["compressed-tensors"]["check"]
    assert isinstance(check, dict)
    assert check["kl_divergence"] < 5e-4
    assert not check["problems"]


def test_a_plan_lists_them_as_they_are_in_the_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS]) == 0
    out = capsys.readouterr().out
    assert re.search(r"export compressed-tensors +reused", out)
    assert re.search(r"check compressed-tensors in transformers +reused", out)


def test_one_that_is_added_afterwards_has_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    later = Path("later")
    shutil.copytree(RUN, later)
    shutil.rmtree(later / "export")
    assert main(["export", "later", "format=compressed-tensors"]) == 0
    place = "export/compressed-tensors"
    assert hashes(later / place) == hashes(RUN / place)
    assert f"cd {Path('later') / place} && vllm serve ." in capsys.readouterr().out
    assert main(["export", "later", "format=compressed-tensors"]) == 1
    assert "overwrites nothing" in capsys.readouterr().err


def test_an_importance_matrix_is_written_of_the_statistics_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(RUN), "format=imatrix", "output=matrix"]) == 0
    [*tensors] = GGUFReader("matrix/imatrix.gguf").tensors
    kept = load_importance(RUN / "importance").mean_squares
    found = {tensor.name: tensor.data for tensor in tensors}
    assert len(found) == 2 * len(kept) == 42
    means = found["blk.1.ffn_down.weight.in_sum2"] / found["blk.1.ffn_down.weight.counts"]
    torch.testing.assert_close(torch.tensor(means[0]), kept["model.layers.1.mlp.down_proj"])
    assert found["blk.1.ffn_down.weight.counts"].item() == 4 * 32
    assert main(["export", str(RUN), "format=imatrix", "output=matrix"]) == 1
    shutil.copytree(RUN, "older", ignore=shutil.ignore_patterns("importance"))
    assert main(["export", "older", "format=imatrix"]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert "overwrites nothing" in errors[-2]
    assert "has no statistics of model.layers.0.self_attn.q_proj" in errors[-1]
    assert not Path("older/export/imatrix").exists()


def test_one_whose_check_is_interrupted_is_complete_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    run = Path("interrupted")
    shutil.copytree(RUN, run)
    shutil.rmtree(run / "export")
    monkeypatch.setattr("jointq_cli.stages.finished_run.check_in_engine", interrupt)
    assert main(["export", str(run), "format=compressed-tensors"]) == 130
    assert (run / "export" / "compressed-tensors" / "README.md").is_file()
    assert records(run)["compressed-tensors"]["check"] is None


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_evaluate_reads_an_export_as_the_checkpoint(name: str) -> None:
    text = ["evaluation.seqlen=32", "evaluation.max_windows=4", "output_dir=out"]
    found = []
    for path in ("checkpoint", f"export/{name}"):
        run = f"out/{path.replace('/', '_')}"
        assert main(["evaluate", f"model.path={RUN / path}", "reference=model", f"hydra.run.dir={run}", *text]) == 0
        evaluation = json.loads(Path(run, "evaluation.json").read_text())
        found.append((evaluation["perplexity"], evaluation["comparison"]))
    assert found[0] == found[1]


def test_a_run_without_exports_into_the_same_directory_leaves_none() -> None:
    assert main(["quantize", *WORDS[:-1], "hydra.run.dir=out/again"]) == 0
    again = Path("out/again")
    shutil.copytree(RUN / "export", again / "export")
    (again / "export" / ".DS_Store").touch()
    assert main(["quantize", *WORDS[:-1], "hydra.run.dir=out/again"]) == 0
    assert not (again / "export").exists()


def test_an_export_that_only_its_weights_forbid_is_a_problem_and_loses_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A scale that float16 cannot hold; the other formats, the measurements and the report are written."""
    tensors = load_file("model/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e-9
    shutil.copytree("model", "small")
    save_file(tensors, "small/model.safetensors", {"format": "pt"})
    words = [*WORDS[:-1], "model.path=small", "hydra.run.dir=out/small", "export=[gptq,compressed-tensors]"]
    assert main(["quantize", *words]) == 1
    assert "not exported" in capsys.readouterr().err
    assert set(records(Path("out/small"))) == {"compressed-tensors"}
    assert "up_proj" in json.loads(Path("out/small/report.json").read_text())["failed_exports"][0]


def test_an_engine_that_fails_is_a_problem_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("jointq_cli.evaluation.engines.TransformersModel.log_probabilities", fail)
    words = [*WORDS[:-1], "hydra.run.dir=out/failed", "export=compressed-tensors", "store=out/other_store"]
    assert main(["quantize", *words]) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().err
    assert Path("out/failed/export/compressed-tensors/config.json").is_file()
    check = records(Path("out/failed"))["compressed-tensors"]["check"]
    assert isinstance(check, dict)
    assert check["kl_divergence"] == "nan"


def test_what_a_format_cannot_hold_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    gptq = [word for word in WORDS if "quantizer" not in word and "export" not in word]
    for words, rule in (
        (["quantizer=gptq", "quantizer.act_order=true", "quantizer.static_groups=false", "export=mlx"], "act_order"),
        (["quantizer=rtn", "quantizer.bits=1", "quantizer.zero_point=integer", "export=compressed-tensors"], "1 bit"),
        (["quantizer=rtn", "export=gguf"], "WordLevel"),
    ):
        for command in ("plan", "quantize"):
            assert main([command, *gptq, "quantizer.group_size=32", *words]) == 1
            error = capsys.readouterr().err
            assert rule in error
            assert error.count("\n") == 1
