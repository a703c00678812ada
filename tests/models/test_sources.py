"""Sources of checkpoints: each gives a directory, or an error that says what to do."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from jointq_cli.errors import ConfigError, ModelError, ResourceError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import BUNDLED, ModelSource, convert_gguf, fetch, provenance
from jointq_cli.models.streamed import StreamedModel


def source(path: str, revision: str | None = None) -> ModelSource:
    return ModelSource(path, revision, trust_remote_code=False)


def refuse(file: Path) -> Path:
    raise AssertionError(f"{file} is no GGUF file")


def converter(directory: Path) -> Callable[[Path], Path]:
    def converted(file: Path) -> Path:
        directory.mkdir()
        convert_gguf(file, directory)
        return directory

    return converted


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A tiny Llama with a byte-level BPE of no merges but one; returns its tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    tokens = ["<s>", "</s>", "th", *(chr(code) for code in range(ord("@"), ord("@") + 61))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 62])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (64, 64), "output_norm": (64,), "output": (64, 64)}
    for block in range(2):
        attention = {
            "attn_norm": (64,),
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
        }
        mlp = {"ffn_norm": (64,), "ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in (attention | mlp).items()}
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_the_bundled_model_needs_no_store_and_no_network() -> None:
    checkpoint = fetch(source("pocket"), refuse)
    assert checkpoint.directory == BUNDLED
    assert checkpoint.dtype == torch.bfloat16


def test_provenance_has_the_commit_of_the_hub(tmp_path: Path) -> None:
    assert provenance(source("pocket"), BUNDLED) == {"from": "jointq"}
    assert provenance(source(str(tmp_path)), tmp_path) == {"from": "disk"}
    fetched = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    assert provenance(source("org/name"), fetched) == {"from": "hub", "revision": "c0ffee"}
    assert provenance(source("org/name"), tmp_path / "elsewhere") == {"from": "hub"}


def test_a_gguf_file_is_converted_into_a_directory(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    checkpoint = fetch(source(str(tmp_path / "tiny.gguf")), converter(tmp_path / "converted"))
    name = "model.layers.1.mlp.down_proj.weight"
    expected = torch.from_numpy(tensors["blk.1.ffn_down"]).bfloat16()
    assert torch.equal(checkpoint.read([name])[name], expected)
    assert len(StreamedModel(checkpoint, torch.device("cpu"), torch.bfloat16)) == 2
    assert (checkpoint.directory / "tokenizer.json").exists()


def test_a_broken_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ModelError, match=r"x\.gguf: transformers cannot read this GGUF file"):
        fetch(source(str(tmp_path / "x.gguf")), converter(tmp_path / "converted"))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "a/b/c", "nowhere.gguf"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(ModelError, match=r"no such (directory|file)"):
        fetch(source(path), refuse)


def test_a_hub_out_of_reach_says_how_to_go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=r"model\.path=some/model: no such directory here.*model\.path=DIR"):
        fetch(source("some/model"), refuse)


def test_a_download_takes_the_checkpoint_and_nothing_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: dict[str, object] = {}

    def download(repository: str, **options: object) -> str:
        requested.update(options, repository=repository)
        return str(BUNDLED)

    monkeypatch.setattr("jointq_cli.models.sources.snapshot_download", download)
    assert isinstance(fetch(source("some/model", "v1"), refuse), Checkpoint)
    assert (requested["repository"], requested["revision"]) == ("some/model", "v1")
    assert "*.py" not in requested["allow_patterns"]  # type: ignore[operator]
    assert "consolidated*" in requested["ignore_patterns"]  # type: ignore[operator]


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="must name a model"):
        source("")
