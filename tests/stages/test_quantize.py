"""A whole run on a model with vision: what is quantised, and what stays."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import write_checkpoint
from transformers import AutoModelForImageTextToText, AutoTokenizer

from jointq_cli.cli.main import main
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.identity import without_identity

TINY = [
    "recipe=ci_smoke", "quantizer=rtn", "quantizer.group_size=32", "calibration.num_samples=8",
    "calibration.seqlen=32", "evaluation.seqlen=32", "evaluation.max_windows=4", "runtime.batch_tokens=64",
    "output_dir=out", "hydra.run.dir=out/run",
]  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral3", "smolvlm_tied"])
def test_only_the_language_model_of_a_wrapper_is_quantized(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jointq_cli.report.pages.run.run_html", lambda report: "")
    tied = {"tie_word_embeddings": True} if family == "smolvlm_tied" else {}
    source = write_checkpoint(tmp_path / "model", family.removesuffix("_tied"), dtype=torch.bfloat16, **tied)
    assert main(["quantize", *TINY, f"model.path={source}"]) == 0

    report = json.loads(Path("out/run/report.json").read_text())
    assert (report["reload_check"], report["audit"]["changed"]) == ("identical", [])
    assert len(report["layers"]) == 14  # of two blocks
    assert sum("the language model alone" in warning for warning in report["warnings"]) == 1
    result = Path("out/run/checkpoint")
    written, original = ((place / "config.json").read_text(encoding="utf-8") for place in (result, source))
    assert without_identity(written) == original
    before, after = Checkpoint(source), Checkpoint(result)
    assert ("lm_head.weight" in before.shapes) == (family == "qwen2_5_vl")  # the others' heads are tied
    assert before.shapes == after.shapes
    assert len([name for name in before.tensors if not before.same_bytes(after, name)]) == 14

    original, loaded = (AutoModelForImageTextToText.from_pretrained(place) for place in (source, result))
    weights = original.state_dict()
    changed = {name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == {f"{layer['name']}.weight" for layer in report["layers"]}
    assert AutoTokenizer.from_pretrained(result)("text").input_ids
