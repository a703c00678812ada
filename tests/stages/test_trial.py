"""What would break a run after all layers are solved is refused before the first one is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from loop_cases import CPU, EQUAL, FULL, NO_QEP, ROUND
from tiny_models import FAMILIES, write_checkpoint
from torch import nn

from jointq_cli.cli.main import main
from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ModelError, NumericsError
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.models import streamed
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.expert_unit import ListedUnit
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.stages.trial import try_paths

MAMBA = transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=256, state_size=8)


def tried(
    directory: Path, length: int = 32, qep: QepSettings = NO_QEP, activations: Activations | None = None
) -> list[int]:
    """The blocks that were loaded."""
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    names = frozenset(name for name in model.linear_layers() if model.block_of(name) is not None and "gate" not in name)
    loop = LoopSettings(ROUND, qep, names, "quantized", EQUAL, 4, 2, 1e9)
    ids = torch.randint(3, 256, (2, length), generator=torch.Generator().manual_seed(0))
    loaded: list[int] = []
    block = model.block

    @contextmanager
    def noting(index: int, tensors: dict[str, torch.Tensor]) -> Iterator[nn.Module]:
        loaded.append(index)
        with block(index, tensors) as module:
            yield module

    model.block = noting  # type: ignore[assignment,method-assign]
    with torch.no_grad():
        try_paths(
            model, Tokens(ids[:, :24], {}), ScoredWindows(ids, ids > 0, length), loop, activations or Activations()
        )
    return loaded


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma3", 1), ("falcon", 1), ("gpt2", 1), ("bamba", 2)])
def test_one_block_of_each_kind_is_loaded(
    family: str, kinds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixer = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "vocab_size": 256}
    config = transformers.BambaConfig(**sizes, **mixer, num_hidden_layers=3, attn_layer_indices=[1])
    monkeypatch.setitem(FAMILIES, "bamba", lambda: config)
    assert tried(write_checkpoint(tmp_path, family)) == list(range(kinds))


def test_a_text_that_is_longer_than_the_positions_of_the_model_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, "gpt2")  # 64 learned positions
    tried(directory, 64)
    with pytest.raises(ModelError, match="GPT2LMHeadModel cannot take windows of 65 tokens"):
        tried(directory, 65)


def test_keys_and_values_that_cannot_be_reached_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "mamba", lambda: MAMBA)
    with pytest.raises(ModelError, match=r"^activations\.kv_bits=4: block 0 of MambaForCausalLM does not look"):
        tried(write_checkpoint(tmp_path, "mamba"), activations=Activations(kv_bits=4))


@pytest.fixture
def unseen_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of which nothing shows which tokens they receive."""

    def fail(self: ListedUnit, call: object) -> None:
        raise ModelError("they receive other vectors")

    monkeypatch.setattr(ListedUnit, "rows", fail)


@pytest.mark.usefixtures("unseen_tokens")
def test_experts_whose_tokens_qep_cannot_pair_are_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, "llama_experts")
    tried(directory)
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.mlp\.experts\.\d+\.\w+: qep cannot pair its tokens"):
        tried(directory, qep=FULL)


def test_a_model_whose_logits_fail_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: StreamedModel, hidden: torch.Tensor) -> torch.Tensor:
        raise ModelError("no logits")

    monkeypatch.setattr(streamed.BlockwiseModel, "logits", fail)
    with pytest.raises(ModelError, match="no logits"):
        tried(write_checkpoint(tmp_path, "llama"))


def test_a_block_that_needs_more_than_it_is_given_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        raise KeyError("per_layer_inputs")

    directory = write_checkpoint(tmp_path, "llama")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fail)
    with pytest.raises(ModelError, match=r"block 0 of LlamaForCausalLM cannot be run alone: 'per_layer_inputs'$"):
        tried(directory)


@pytest.mark.usefixtures("unseen_tokens")
def test_a_run_is_refused_before_any_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["recipe=ci_smoke", f"model.path={write_checkpoint(tmp_path / 'model', 'llama_experts')}", "output_dir=out"]
    few = ["calibration.num_samples=8", "calibration.seqlen=32", "evaluation.seqlen=32", "evaluation.max_windows=4"]
    assert main(["quantize", *words, *few, "quantizer.group_size=32"]) == 1
    assert not list(tmp_path.glob("out/store/*quantize*")) + list(tmp_path.glob("out/store/partial/quantize*"))
