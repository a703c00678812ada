"""Sources of checkpoints: each gives a directory, or an error that says what to do."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import edit_config, write_checkpoint

from jointq_cli.errors import ConfigError, ModelError, ResourceError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import BUNDLED, ModelSource, fetch, provenance


def source(path: str, revision: str | None = None) -> ModelSource:
    return ModelSource(path, revision, trust_remote_code=False)


def refuse(file: Path) -> Path:
    raise AssertionError(f"{file} is no GGUF file")


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


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "a/b/c", "nowhere.gguf"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(ModelError, match=r"no such (directory|file)"):
        fetch(source(path), refuse)


def test_a_relative_path_says_relative_to_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=re.escape(f"model.path=./nowhere: no such directory in {tmp_path};")):
        fetch(source("./nowhere"), refuse)


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


def test_a_quantised_checkpoint_is_converted_only_where_it_may_be(tmp_path: Path) -> None:
    packed = write_checkpoint(tmp_path / "packed")
    edit_config(packed, quantization={"bits": 4, "group_size": 32}, quantization_config={"bits": 4, "group_size": 32})
    converted: list[Path] = []

    def convert(place: Path) -> Path:
        converted.append(place)
        return BUNDLED

    assert fetch(source(str(packed)), convert, packed=True).directory == BUNDLED
    assert fetch(source("pocket"), convert, packed=True).directory == BUNDLED
    assert converted == [packed]
    with pytest.raises(ModelError, match="is quantised already"):
        fetch(source(str(packed)), refuse)


def test_a_directory_with_one_gguf_file_stands_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "model-q4_0.gguf").touch()
    (tmp_path / "README.md").touch()
    asked: list[Path] = []
    fetch(source(str(tmp_path)), lambda file: asked.append(file) or BUNDLED)
    assert asked == [tmp_path / "model-q4_0.gguf"]
    (tmp_path / "model-q8_0.gguf").touch()
    with pytest.raises(ModelError, match=r"config\.json"):
        fetch(source(str(tmp_path)), refuse)
