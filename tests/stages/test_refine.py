"""A refined model from the command to the report, its plan, and what is refused in one line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import write_checkpoint

from jointq_cli.cli.main import main
from jointq_cli.errors import ConfigError, ResourceError
from jointq_cli.formats.layer_file import load_layer
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.quantizers import JointQ
from jointq_cli.quantization.refinement.settings import BlockRefinement, ModelRefinement, NoRefinement
from jointq_cli.records import RunReport
from jointq_cli.report import load_report
from jointq_cli.report.figures.run import refinement_figures
from jointq_cli.report.summary import problems, provenance
from jointq_cli.stages.refine import check_refinable, require_memory

FEW = ["refinement.steps=4", "refinement.validate_every=2", "refinement.heldout_share=0.25", "refinement.generated=4"]
RATES = ["refinement.code_lr=0.1", "refinement.scale_lr=0.01", "refinement.norm_lr=0.01"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refined")
    write_checkpoint(path / "model", "llama_tied")
    (path / "text.txt").write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)}." for n in range(200)))
    return path


def run(place: Path, name: str, *settings: str, command: str = "quantize") -> int:
    text = f"path={place / 'text.txt'}"
    return main(
        [
            command, f"model.path={place / 'model'}", f"output_dir={place / 'out'}", "recipe=ci_smoke",
            *([f"hydra.run.dir={place / 'out' / name}"] if command == "quantize" else []),
            "evaluation=text", f"evaluation.{text}", "evaluation.seqlen=32", "evaluation.max_windows=8",
            "calibration=text", f"calibration.{text}", "calibration.num_samples=8", "calibration.seqlen=32",
            "quantizer=rtn", "quantizer.bits=2", "quantizer.group_size=32", "qep=none", "generate_tokens=0", *settings,
        ]
    )  # fmt: skip


def report(place: Path, name: str) -> RunReport:
    return load_report(place / "out" / name / "report.json")


def test_a_refined_run_is_whole_and_says_what_has_changed(place: Path) -> None:
    assert (
        run(place, "model", "refinement=model", "export=compressed-tensors", "check_exports=false", *FEW, *RATES) == 0
    )
    found = report(place, "model")
    assert found.refinement is not None
    assert [course.name for course in found.refinement.courses] == ["model"]
    assert found.audit.passed
    assert found.audit.refined > 0
    assert not problems(found)
    lines = dict(provenance(found))
    assert lines["refinement"].startswith(
        "model scales+norms+codes 4 x 2 windows generated=4 seed=0; loss of held-out windows "
    )
    assert f"{found.audit.refined} gains of norms refined" in lines["tensor audit"]
    unchanged = replace(found, audit=replace(found.audit, refined=0))
    assert (
        " and 0 gains of norms changed; E_y and E_w of layers are from before"
        in dict(provenance(unchanged))["refinement"]
    )
    page = (place / "out" / "model" / "report.html").read_text(encoding="utf-8")
    assert f"is identical to the source but for {found.audit.refined} gains of norms that were trained, and" in page
    [figure] = refinement_figures(found.refinement)
    assert "How the model was refined" in figure.title

    checkpoint = Checkpoint(place / "out" / "model" / "checkpoint")
    layer = load_layer(place / "out" / "model" / "codes" / "model.layers.1.mlp.up_proj.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert checkpoint.read([name])[name].equal(layer.dequantize(checkpoint.dtype))
    exported = Checkpoint(place / "out" / "model" / "export" / "compressed-tensors", packed=True)
    assert exported.same_bytes(checkpoint, "model.norm.weight")
    assert not checkpoint.same_bytes(Checkpoint(place / "model"), "model.norm.weight")


def test_the_plan_has_the_stage_and_its_memory(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jointq_cli.system.machine.available_memory", lambda: 10**8)
    monkeypatch.setattr("jointq_cli.stages.plan.refinement_cost.trained_activations", lambda load: 1e9)
    assert run(place, "", "refinement=model", *FEW, command="plan") == 0
    found = capsys.readouterr().out
    assert "refinement=model: stage refine takes about " in " ".join(found.split())


def test_what_cannot_be_refined_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"refinement.train=\[\]: leaves nothing to train; use refinement=none"):
        ModelRefinement(train=[])
    with pytest.raises(ConfigError, match=r"refinement.train=\['biases'\]: each value must be one of"):
        BlockRefinement(train=["biases"])


def test_other_grids_are_refused(place: Path) -> None:
    model = StreamedModel(Checkpoint(place / "model"), torch.device("cpu"), torch.float32)
    layers = {"model.layers.0.mlp.up_proj": JointQ(grid="q4_k")}
    check_refinable(model, layers, NoRefinement(), 1)
    with pytest.raises(ConfigError, match=r"refinement=block: model.layers.0.mlp.up_proj is stored as .*uniform grids"):
        check_refinable(model, layers, BlockRefinement(), 64)


def test_too_few_windows_are_refused_before_any_work(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["refinement=block", "refinement.heldout_share=0.9", "calibration.num_samples=2"]
    assert run(place, "few", *settings) == 1
    found = " ".join(capsys.readouterr().err.split())
    assert "calibration.num_samples=2: refinement.heldout_share=0.9 holds out 2 of them" in found
    assert "quantize ..." not in found


def test_a_model_that_does_not_fit_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel(Checkpoint(place / "model"), torch.device("cpu"), torch.float32)
    monkeypatch.setattr("jointq_cli.stages.refine.available_memory", lambda: 10**6)
    require_memory(model, 10**5, ModelRefinement(train=["scales", "norms"]))
    with pytest.raises(ResourceError, match=r"GB are free; refinement=block, or refinement.train=\[scales,norms\]"):
        require_memory(model, 10**5, ModelRefinement())
