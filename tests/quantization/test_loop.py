"""The quantising loop: its statistics, its order, and the same bits however often it was stopped."""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from loop_cases import (
    CPU,
    EQUAL,
    FULL,
    JOINT,
    NO_QEP,
    QEP,
    ROUND,
    SOLVE,
    WEIGHED,
    file_hashes,
    granite,
    quantize,
    windows,
)
from safetensors.torch import load_file
from tiny_models import FAMILIES, write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.formats.audit import audit
from jointq_cli.formats.layer_file import load_layer
from jointq_cli.models.checkpoint import SINGLE, Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.block import Block
from jointq_cli.quantization.importance import load_importance
from jointq_cli.quantization.qep import Correction, Qep, QepSettings
from jointq_cli.quantization.quantizers import RTN, Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.statistics import HeldOut, Statistics
from jointq_cli.system.tensor_files import save_tensors


@dataclass(frozen=True)
class Spy(RTN):
    """Rounds to nearest and keeps the Hessians it receives."""

    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        SEEN.append(hessian.clone())
        return super().prepare(hessian)


SEEN: list[Tensor] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()


def hessian_by_hooks(directory: Path, ids: Tensor, name: str) -> Tensor:
    """X^T X / tokens of one layer's input, with the whole model in memory."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    inputs: list[Tensor] = []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    x = torch.cat(inputs).double()
    return x.T @ x / len(x)


BOTH = (("rtn", ROUND), ("gptq", SOLVE))
LLAMA_GROUPS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


def test_with_original_inputs_every_hessian_is_that_of_the_whole_original_model(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    quantize(directory, tmp_path / "work", Spy(**vars(ROUND)), inputs="original")
    expected = [
        hessian_by_hooks(directory, windows(), f"model.layers.{block}.{kind}")
        for block in range(3)
        for kind in LLAMA_GROUPS
    ]
    assert len(SEEN) == len(expected)
    for seen, wanted in zip(SEEN, expected, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-5)


def test_with_quantised_inputs_every_hessian_is_that_of_the_model_quantised_so_far(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    quantize(directory, tmp_path / "work", Spy(**vars(ROUND)), inputs="quantized")
    # A layer's input depends on the layers before it alone, so the finished checkpoint computes it again.
    expected = [
        hessian_by_hooks(tmp_path / "work" / "checkpoint", windows(), f"model.layers.{block}.{kind}")
        for block in range(3)
        for kind in LLAMA_GROUPS
    ]
    for seen, wanted in zip(SEEN, expected, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
        ("gpt_neox", [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]),
    ],
)
def test_layers_that_share_an_input_share_their_preparation(
    family: str, groups: list[list[str]], tmp_path: Path
) -> None:
    _, _, records = quantize(write_checkpoint(tmp_path / "model", family), tmp_path / "work", Spy(**vars(ROUND)))
    assert [record.kind for record in records] == [kind for group in groups for kind in group] * 3
    assert len(SEEN) == 3 * len(groups)


@pytest.mark.parametrize("inputs", ["original", "quantized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_computes_what_the_loop_computed(family: str, inputs: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", family)
    model, workspace, records = quantize(directory, tmp_path / "work", inputs=inputs)
    reloaded = Checkpoint(tmp_path / "work" / "checkpoint")
    with torch.no_grad():
        hidden = final_hidden(StreamedModel(reloaded, CPU, torch.float32), windows()[:4], batch=4)
    assert torch.equal(hidden, workspace.hidden.read("quantized"))
    audited = audit(model, reloaded, records, tmp_path / "work" / "layers")
    assert audited.passed
    assert audited.quantized == len(records)
    assert audited.identical + audited.quantized == len(model.checkpoint.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_the_checkpoint(family: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", family)
    quantize(directory, tmp_path / "work")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "work" / "checkpoint", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    source = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (loaded, source)]
    assert tied[0] == tied[1]


def test_errors_in_the_records_are_those_of_the_stored_weights(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    model, _, records = quantize(directory, tmp_path / "work", inputs="original")
    stored = Checkpoint(tmp_path / "work" / "checkpoint")
    for record in (records[0], records[-1]):
        key = f"{record.name}.weight"
        weight, found = model.checkpoint.read([key])[key].double(), stored.read([key])[key].double()
        hessian = hessian_by_hooks(directory, windows(), record.name)
        error = weight - found
        expected = torch.trace(error @ hessian @ error.T) / torch.trace(weight @ hessian @ weight.T)
        assert record.output_error == pytest.approx(expected.item(), rel=1e-3)
        assert record.weight_error == pytest.approx((error.square().sum() / weight.square().sum()).item(), rel=1e-6)


def test_blocks_without_a_selected_layer_are_passed_through(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    model, _, records = quantize(directory, tmp_path / "work", keep=lambda name: "layers.1.mlp.down" in name)
    assert [record.name for record in records] == ["model.layers.1.mlp.down_proj"]
    result = Checkpoint(tmp_path / "work" / "checkpoint")
    changed = [
        name
        for name in result.tensors
        if not torch.equal(result.read([name])[name], model.checkpoint.read([name])[name])
    ]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize(("inputs", "qep"), [("original", NO_QEP), ("quantized", NO_QEP), ("quantized", FULL)])
def test_a_run_stopped_anywhere_ends_with_the_bits_of_an_undisturbed_one(
    inputs: str, qep: QepSettings, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    ticks = Counter[str]()
    _, undisturbed, _ = quantize(
        directory, tmp_path / "whole", SOLVE, inputs, pause=lambda: ticks.update(["pause"]), qep=qep, weights=WEIGHED
    )

    def results(folder: Path) -> list[dict[str, str]]:
        return [file_hashes(folder / name) for name in ("checkpoint", "layers", "importance")]

    expected = results(undisturbed.directory)
    assert len(expected[2]) == 4 * len(undisturbed.blocks())  # groups

    class Stop(Exception):
        pass

    for stop in range(1, ticks["pause"], 7):  # within collections, between layers, while propagating
        left = stop

        def pause() -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Stop

        scratch = tmp_path / f"stopped{stop}"
        with pytest.raises(Stop):
            quantize(directory, scratch, SOLVE, inputs, pause=pause, qep=qep, weights=WEIGHED)
        _, workspace, _ = quantize(directory, scratch, SOLVE, inputs, qep=qep, weights=WEIGHED)
        assert results(scratch) == expected
        assert workspace.blocks() == undisturbed.blocks()


def test_the_diagonals_of_the_hessians_are_kept(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    model, workspace, _ = quantize(directory, tmp_path / "work", Spy(**vars(ROUND)))
    kept = load_importance(workspace.importance)
    assert (kept.windows, kept.seqlen) == tuple(windows().shape)
    assert set(kept.mean_squares) == {name for name in model.linear_layers() if model.block_of(name) is not None}
    for place, layer in ((0, "self_attn.k_proj"), (1, "self_attn.o_proj"), (3, "mlp.down_proj")):
        assert torch.equal(kept.mean_squares[f"model.layers.0.{layer}"], SEEN[place].diagonal().float())


def test_a_finished_layer_is_never_solved_again(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    quantize(directory, tmp_path / "work", Spy(**vars(ROUND)))
    count = len(SEEN)
    _, workspace, records = quantize(directory, tmp_path / "work", Spy(**vars(ROUND)))
    assert len(SEEN) == count
    assert records == []
    assert load_layer(workspace.directory / "layers" / "model.layers.0.mlp.up_proj.safetensors").bits == 4


@dataclass(frozen=True)
class Failing(RTN):
    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        raise NumericsError("cannot")


def test_a_layer_that_cannot_be_solved_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.self_attn\.q_proj: cannot$"):
        quantize(directory, tmp_path / "work", Failing(**vars(ROUND)))


def test_solving_beats_rounding_on_the_outputs(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    rounding = replace(ROUND, bits=3, mse=True)
    errors = [
        sum(record.output_error for record in quantize(directory, tmp_path / name, quantizer, "original")[2])
        for name, quantizer in (("rtn", rounding), ("gptq", SOLVE), ("jointq", JOINT))
    ]
    assert errors[2] < errors[1] < errors[0]


@dataclass(frozen=True)
class HeldOutSpy(RTN):
    """Rounds to nearest, requests held-out tokens and keeps their statistics."""

    share: float = 0.25

    @property
    def heldout(self) -> float:
        return self.share

    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        assert heldout is not None
        HELD_OUT.append((hessian.clone(), heldout))
        return super().prepare(hessian)


HELD_OUT: list[tuple[Tensor, HeldOut]] = []


# windows, windows per forward pass, requested share: how many of the last windows are held out
PASSES = [
    (6, 4, 0.25, 2),
    (6, 1, 0.25, 2),
    (6, 1, 0.5, 3),
    (6, 2, 0.01, 2),
    (7, 3, 0.3, 1),
    (6, 1, 0.99, 5),
    (6, 4, 0.9, 2),
]


@pytest.mark.parametrize("inputs", ["original", "quantized"])
@pytest.mark.parametrize(("count", "batch", "share", "held"), PASSES)
def test_the_last_passes_are_held_out_and_some_are_left(
    count: int, batch: int, share: float, held: int, inputs: str, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model")
    tokens = windows(count)
    HELD_OUT.clear()
    quantizer = HeldOutSpy(**vars(ROUND), share=share)
    quantize(
        directory, tmp_path / "work", quantizer, inputs, lambda name: "layers.0" in name, tokens=tokens, batch=batch
    )
    seen = tmp_path / "work" / "checkpoint" if inputs == "quantized" else directory
    assert len(HELD_OUT) == len(LLAMA_GROUPS)
    for (everything, part), kind in zip(HELD_OUT, LLAMA_GROUPS, strict=True):
        assert part.share == pytest.approx(held / count)
        name = f"model.layers.0.{kind}"
        torch.testing.assert_close(everything, hessian_by_hooks(seen, tokens, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.hessian, hessian_by_hooks(seen, tokens[-held:], name), rtol=1e-4, atol=1e-5)
        rest = hessian_by_hooks(seen, tokens[:-held], name)
        torch.testing.assert_close(part.complement(everything), rest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inputs", ["original", "quantized"])
def test_jointq_chooses_lambda_per_layer_by_held_out_windows(inputs: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    quantizer = replace(JOINT, lambda_mode="heldout")
    _, _, records = quantize(directory, tmp_path / "work", quantizer, inputs, batch=1)
    chosen = [record.notes["lambda"] for record in records]
    assert set(chosen) <= {0.1, 1.0}  # not 0: there are fewer tokens than columns, or hardly more
    assert {record.verdict for record in records} <= {"ok", "damped"}
    again = quantize(directory, tmp_path / "again", quantizer, inputs, batch=1)[2]
    assert [record.notes["lambda"] for record in again] == chosen
    assert file_hashes(tmp_path / "again" / "checkpoint") == file_hashes(tmp_path / "work" / "checkpoint")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_with_qep_lambda_follows_the_tokens_for_each_column(family: str, tmp_path: Path) -> None:
    """tokens (6 x 16), or those that reach the expert; lambda is 5 in_features / tokens, and 0.3 without QEP."""
    directory = write_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    quantizer = replace(JOINT, regularization_lambda=None)
    _, _, records = quantize(directory, tmp_path / "work", quantizer, keep=lambda name: "layers.0" in name, qep=FULL)
    solved = [record for record in records if "lambda" in record.notes]
    assert len({record.in_features for record in solved}) > 1
    for record in solved:
        tokens = 96 if record.tokens is None else record.tokens
        assert record.notes["lambda"] == pytest.approx(5 * record.in_features / tokens)
    _, _, records = quantize(directory, tmp_path / "plain", quantizer, keep=lambda name: "0.self_attn.q" in name)
    assert [record.notes["lambda"] for record in records] == [0.3]


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_windows_to_hold_a_pass_out_are_an_error_before_any_work(count: int, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    message = rf"^calibration.num_samples={count}: must be more than the 4 windows .* lower runtime.batch_tokens$"
    with pytest.raises(ConfigError, match=message):
        quantize(directory, tmp_path / "work", replace(JOINT, lambda_mode="heldout"), tokens=windows(count))
    assert not list((tmp_path / "work").rglob("*.safetensors"))
    quantize(directory, tmp_path / "fixed", JOINT, tokens=windows(count), keep=lambda name: "0.self_attn.q" in name)


def test_the_source_of_a_linear_layer_keeps_its_bias(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", "llama_bias")
    model, _, _ = quantize(directory, tmp_path / "work")
    assert isinstance(model.linear_layers()["model.layers.0.mlp.up_proj"].module, nn.Linear)
    name = "model.layers.0.mlp.up_proj.bias"
    result = Checkpoint(tmp_path / "work" / "checkpoint")
    assert torch.equal(result.read([name])[name], model.checkpoint.read([name])[name])


class OutIn(nn.Linear):
    """A linear layer constructed like a Conv1D."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(in_features, out_features)


def test_a_conv1d_has_the_codes_of_a_linear_layer_with_its_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path / "model", "gpt2")
    turned = tmp_path / "turned"
    shutil.copytree(directory, turned)
    tensors = load_file(directory / SINGLE)
    matrices = [name for name, tensor in tensors.items() if ".h." in name and tensor.dim() == 2]
    save_tensors(turned / SINGLE, {**tensors, **{name: tensors[name].T for name in matrices}})
    rounded, solved = (quantize(directory, tmp_path / name, quantizer)[1] for name, quantizer in BOTH)
    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.Conv1D", OutIn)
    as_linear, as_linear_solved = (
        quantize(turned, tmp_path / f"{name}_turned", quantizer)[1] for name, quantizer in BOTH
    )
    assert len(matrices) == 12
    assert file_hashes(rounded.directory / "layers") == file_hashes(as_linear.directory / "layers")
    results = [Checkpoint(tmp_path / name / "checkpoint") for name in ("rtn", "rtn_turned")]
    for name in matrices:
        [kept, other] = [result.read([name])[name] for result in results]
        assert torch.equal(kept, other.T)
        # Products of the two modules are rounded differently, and with them the Hessians of all layers but the first.
        [codes, expected] = [
            load_layer(work.directory / "layers" / f"{name.removesuffix('.weight')}.safetensors").codes
            for work in (solved, as_linear_solved)
        ]
        assert int((codes != expected).sum()) <= (0 if ".h.0.attn.c_attn" in name else codes.numel() // 1000)


# QEP: hidden states of the original and of the quantised model


@dataclass(frozen=True)
class SpyQep(Qep):
    """Corrects, and keeps the cross terms it receives."""

    def correction(self, statistics: Statistics, ridge: Tensor | None) -> Correction:
        assert statistics.cross is not None
        CROSS_TERMS.append(statistics.cross.clone())
        return super().correction(statistics, ridge)


CROSS_TERMS: list[Tensor] = []


def inputs_by_hooks(directory: Path, name: str) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(windows())
    return seen[0].double()


@pytest.mark.parametrize("suspended", [0.0, 1e9])
def test_cross_terms_pair_the_original_model_with_the_one_quantised_so_far(suspended: float, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    CROSS_TERMS.clear()
    quantize(directory, tmp_path / "work", ROUND, qep=SpyQep(**vars(QEP)), suspended=suspended)
    names = [f"model.layers.{block}.{kind}" for block in range(3) for kind in LLAMA_GROUPS[:3]]  # not down_proj
    assert len(CROSS_TERMS) == len(names)
    for found, name in zip(CROSS_TERMS, names, strict=True):
        original, quantized = inputs_by_hooks(directory, name), inputs_by_hooks(tmp_path / "work" / "checkpoint", name)
        torch.testing.assert_close(found, (original - quantized).T @ quantized / len(quantized), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("llama", "gemma2", "gpt_neox") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_qep_brings_every_quantizer_closer_to_the_original_model(family: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", family)
    tokens = windows(40)
    whole = replace(QEP, perccorr=1.0, exclude_layer_keywords=[])
    for name, quantizer in (("rtn", ROUND), ("gptq", SOLVE), ("jointq", JOINT)):
        drift = [
            quantize(directory, tmp_path / f"{name}_{qep.describe()}", quantizer, tokens=tokens, qep=qep)[1].blocks()
            for qep in (NO_QEP, whole)
        ]
        assert drift[1][-1].output_error < drift[0][-1].output_error


def test_the_same_bits_whether_passes_are_suspended_or_restarted(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    one_pass = 4 * 16 * (4 * 64 + 128) * 2  # bytes: windows, tokens, features of a pass of this model, in float32
    hashes = []
    for number, suspended in enumerate((0.0, 2.5 * one_pass, 1e9)):
        quantize(directory, tmp_path / str(number), SOLVE, qep=FULL, suspended=suspended, batch=1, weights=WEIGHED)
        hashes.append(file_hashes(tmp_path / str(number) / "checkpoint"))
    assert hashes[0] == hashes[1] == hashes[2]


# inputs, qep, bytes of suspended passes -> forward passes per block: 5 batches with each set of weights that statistics
# depend on, 1 with the other, 1 to find the groups. Restarted passes run once more for each of the groups they stop at.
COUNTS = [
    ("original", NO_QEP, 1e9, 5 + 1 + 1),
    ("quantized", NO_QEP, 1e9, 5 + 1 + 1),
    ("quantized", QEP, 1e9, 5 + 5 + 1),
    ("quantized", NO_QEP, 0.0, 5 * 5 + 1 + 1),
    ("quantized", QEP, 0.0, 5 * 5 + 5 * 4 + 1),
]


@pytest.mark.parametrize(("inputs", "qep", "suspended", "expected"), COUNTS)
def test_no_more_forward_passes_than_needed(
    inputs: str, qep: QepSettings, suspended: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path / "model")
    runs = Counter[int]()
    run = StreamedModel.run

    def counting(self: StreamedModel, index: int, hidden: Tensor) -> Tensor:
        runs[index] += 1
        return run(self, index, hidden)

    monkeypatch.setattr(StreamedModel, "run", counting)
    quantize(directory, tmp_path / "work", inputs=inputs, qep=qep, suspended=suspended, tokens=windows(5), batch=1)
    assert runs == {0: expected, 1: expected, 2: expected}


def test_qep_needs_quantised_inputs(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^calibration\.inputs=original: must be quantized with qep"):
        quantize(directory, tmp_path / "work", inputs="original", qep=QEP)


def test_different_heldout_shares_are_an_error(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    qep = replace(QEP, perccorr_mode="heldout", heldout_share=0.5)
    with pytest.raises(ConfigError, match=r"^qep\.heldout_share=0\.5: must be the quantizer's 0\.25"):
        quantize(directory, tmp_path / "work", replace(JOINT, lambda_mode="heldout"), qep=qep, batch=1)


def test_statistics_have_the_requested_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "model")
    requested: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", requested.append)
    for precision in (None, "medium"):
        quantize(directory, tmp_path / f"{precision}", precision=precision)
        assert ("medium" in requested) == (precision == "medium")


@pytest.mark.parametrize(("mode", "note"), [("heldout", "alpha"), ("shrinkage", "kept")])
def test_alpha_is_chosen_per_layer_and_recorded(mode: str, note: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    qep = replace(QEP, perccorr_mode=mode)
    _, _, records = quantize(directory, tmp_path / "work", SOLVE, qep=qep, tokens=windows(40), batch=4)
    alphas = {record.name: record.notes.get(note) for record in records}
    assert all(alpha is None for name, alpha in alphas.items() if "down_proj" in name)
    later = [alpha for name, alpha in alphas.items() if "layers.0." not in name and "down_proj" not in name]
    assert all(isinstance(alpha, float) and 0 < alpha <= 1 for alpha in later)
    assert len(set(later)) > 5


@pytest.mark.parametrize(("inputs", "qep"), [("original", NO_QEP), ("quantized", NO_QEP), ("quantized", QEP)])
def test_the_error_of_a_block_is_that_of_the_whole_model_up_to_it(
    inputs: str, qep: QepSettings, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model")
    _, workspace, _ = quantize(directory, tmp_path / "work", inputs=inputs, qep=qep)
    for record in workspace.blocks()[:2]:  # the model's own last hidden state has passed its final norm
        original, quantized = (
            AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
            .eval()(windows()[:4], output_hidden_states=True)
            .hidden_states[record.block + 1]
            for where in (directory, tmp_path / "work" / "checkpoint")
        )
        expected = (quantized - original).square().sum() / original.square().sum()
        assert record.output_error == pytest.approx(expected.item(), rel=1e-3)
    assert len(workspace.blocks()) == 3


def test_weighed_tokens_enter_the_hessian(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    weights = TokenWeights("input", power=2.0, first_token=1.0)
    quantize(directory, tmp_path / "work", Spy(**vars(ROUND)), inputs="original", weights=weights)
    name = "model.layers.0.mlp.down_proj"
    x = inputs_by_hooks(directory, name)
    counts = x.square().mean(dim=1).pow(-1)
    torch.testing.assert_close(SEEN[3], (x * counts[:, None]).T @ x / counts.sum(), rtol=1e-4, atol=1e-6)


# the residual stream

WRITERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "llama_bias": ["self_attn.o_proj", "mlp.down_proj"],
    "mistral": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "phi3": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],  # both read the hidden states that enter the block
    "gemma3": [],  # a norm between its layers and the residual stream
    "olmo2": [],
}


def writers_of(directory: Path, dtype: torch.dtype, scale: float = 1.0) -> dict[str, float]:
    """Names and factors of the writers of the first block."""
    model = StreamedModel(Checkpoint(directory), CPU, dtype)
    with torch.no_grad():
        hidden = model.embed_all(windows(), 4) * scale
        tensors = model.block_tensors(0)
        with model.block(0, tensors) as module:
            structure = Block(model, 0, tensors, frozenset()).structure(hidden[:4])
            names = {layer: name for name, layer in module.named_modules()}
    return {names[layer]: factor for layer, factor in structure.writers.items()}


@pytest.mark.parametrize(
    "scale", [1.0, 1000.0]
)  # 1000: massive activations, whose rounding in bf16 exceeds what is added
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WRITERS)
def test_layers_that_write_into_the_residual_stream_are_found_by_what_they_add(
    family: str, dtype: torch.dtype, scale: float, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model", family, dtype=dtype)
    assert writers_of(directory, dtype, scale) == dict.fromkeys(WRITERS[family], 1.0)


def test_the_factor_of_the_writers_is_found(tmp_path: Path) -> None:
    found = writers_of(granite(tmp_path / "model"), torch.float32)
    assert found == pytest.approx({"self_attn.o_proj": 0.25, "mlp.down_proj": 0.25}, rel=1e-3)


@dataclass(frozen=True)
class SpyDrift(Qep):
    """Corrects, and keeps the drifts it receives."""

    def correction(self, statistics: Statistics, ridge: Tensor | None) -> Correction:
        DRIFTS.append(None if statistics.drift is None else statistics.drift.clone())
        return super().correction(statistics, ridge)


DRIFTS: list[Tensor | None] = []


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_the_drift_is_the_error_of_the_residual_stream_before_a_layer_writes(family: str, tmp_path: Path) -> None:
    make = granite if family == "granite" else write_checkpoint
    directory, factor = make(tmp_path / "model"), 0.25 if family == "granite" else 1.0
    DRIFTS.clear()
    quantize(directory, tmp_path / "work", ROUND, qep=SpyDrift(**vars(FULL)))
    result = tmp_path / "work" / "checkpoint"
    for block in range(2):
        found = DRIFTS[4 * block : 4 * block + 4]  # q k v | o | gate up | down
        assert found[0] is None
        assert found[2] is None
        for drift, norm, layer in (
            (found[1], "input_layernorm", "self_attn.o_proj"),
            (found[3], "post_attention_layernorm", "mlp.down_proj"),
        ):
            place = f"model.layers.{block}."
            lost = inputs_by_hooks(directory, place + norm) - inputs_by_hooks(result, place + norm)
            quantized = inputs_by_hooks(result, place + layer)
            torch.testing.assert_close(drift, lost.T @ quantized / len(quantized) / factor, rtol=1e-2, atol=1e-4)


def test_tokens_are_weighed_by_the_residual_stream_after_a_layer_that_writes(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    weights = TokenWeights("residual", power=2.0, first_token=1.0)
    quantize(directory, tmp_path / "work", Spy(**vars(ROUND)), inputs="original", weights=weights)
    x = inputs_by_hooks(directory, "model.layers.0.self_attn.o_proj")
    counts = inputs_by_hooks(directory, "model.layers.0.post_attention_layernorm").square().mean(dim=1).reciprocal()
    torch.testing.assert_close(SEEN[1], (x * counts[:, None]).T @ x / counts.sum(), rtol=1e-3, atol=1e-5)
    name = "model.layers.0.mlp.gate_proj"  # reads the stream through a norm, writes none
    torch.testing.assert_close(SEEN[2], hessian_by_hooks(directory, windows(), name), rtol=1e-4, atol=1e-5)


RESIDUAL = replace(QEP, perccorr=1.0, residual=1.0, percdamp=0.0, pull="corrected", exclude_layer_keywords=[])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("suspended", [0.0, 1e9])
def test_writers_compensate_the_error_of_the_residual_stream(family: str, suspended: float, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", family)
    tokens = windows(40)
    kept = lambda name: "layers.0." in name or "layers.1." in name  # noqa: E731
    errors = {}
    for qep in (NO_QEP, replace(RESIDUAL, residual=0.0), RESIDUAL):
        scratch = tmp_path / f"{qep.describe()}"
        coarse = replace(ROUND, bits=3)
        _, workspace, _ = quantize(directory, scratch, coarse, keep=kept, tokens=tokens, qep=qep, suspended=suspended)
        errors[qep.describe()] = [block.output_error for block in workspace.blocks()]
    none, plain, residual = errors.values()
    assert residual[0] < plain[0] < none[0]
    assert residual[1] < plain[1] < none[1]


@pytest.mark.parametrize("quantizer", [SOLVE, JOINT])
def test_a_layer_that_falls_back_to_rtn_is_not_corrected(
    quantizer: Quantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NumericsError("no factor")

    directory = write_checkpoint(tmp_path / "model")
    monkeypatch.setattr(type(quantizer), "_prepare", fail)
    _, _, records = quantize(directory, tmp_path / "work", replace(quantizer, on_failure="rtn"), qep=FULL)
    assert records[0].verdict == "fallback"
    assert "alpha" not in records[0].notes


@pytest.mark.parametrize(
    "weights", [EQUAL, TokenWeights("input", power=2.0, first_token=1.0)], ids=lambda w: w.weighting
)
@pytest.mark.parametrize(
    "quantizer", [ROUND, SOLVE, JOINT, replace(JOINT, lambda_mode="heldout")], ids=["RTN", "GPTQ", "JointQ", "heldout"]
)
def test_a_layer_whose_inputs_are_all_zero_is_rounded(
    quantizer: Quantizer, weights: TokenWeights, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model")
    tensors = load_file(directory / SINGLE)
    tensors["model.layers.1.self_attn.v_proj.weight"].zero_()
    save_tensors(directory / SINGLE, tensors)
    *_, records = quantize(directory, tmp_path / "run", quantizer, qep=FULL, weights=weights)
    name = "model.layers.1.self_attn.o_proj"
    assert [record.name for record in records if record.verdict == "no input"] == [name]
    expected = replace(ROUND, bits=quantizer.bits, mse=True) if quantizer is not ROUND else ROUND  # type: ignore[attr-defined]
    weight = tensors[f"{name}.weight"]
    rounded = expected.quantize(weight, Prepared(), torch.float32).quantized.dequantize(torch.float32)
    assert torch.equal(
        load_layer(tmp_path / "run" / "layers" / f"{name}.safetensors").dequantize(torch.float32), rounded
    )
