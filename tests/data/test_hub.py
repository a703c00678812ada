"""Data sets of the hub: at a fixed commit, from the cache, streamed, and unreachable."""

import socket
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from text_cases import source

from jointq_cli.data.corpus import open_corpus
from jointq_cli.errors import ResourceError, TextError


def no_hub(*_: object, **__: object) -> None:
    raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode\nis enabled")


@pytest.mark.parametrize("dataset", ["wikitext2", "c4"])
def test_an_unreachable_hub_says_how_to_go_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_hub)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked for an address"))
    with pytest.raises(ResourceError) as caught:
        open_corpus(source(dataset, split="train"))
    message = str(caught.value)
    assert message.startswith(f"evaluation.dataset={dataset}: cannot fetch ")
    assert message.endswith("evaluation.path=FILE, or take evaluation.dataset=pydoc evaluation.split=evaluation")
    assert "\n" not in message
    assert not datasets.config.HF_HUB_OFFLINE


def test_an_unknown_revision_is_not_taken_for_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        error = huggingface_hub.errors.RevisionNotFoundError
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(TextError, match=r"evaluation\.revision=v9: Salesforce/wikitext has no such revision"):
        open_corpus(source("wikitext2", split="test", revision="v9"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_hub_is_read_at_the_commit_that_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: dict[str, object] = {}

    def load(*names: str, **options: object) -> list[dict[str, str]]:
        requested.update(options, names=names)
        return [{"text": ""}, {"text": " = Title = \n"}]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    monkeypatch.setattr(datasets, "load_dataset", load)
    settings = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    corpus = open_corpus(source("wikitext2", split="test"))
    assert list(corpus.documents) == ["", " = Title = \n"]
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == settings
    assert corpus.provenance["revision"] == requested["revision"] == COMMIT
    assert requested["names"] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert requested["split"] == "test"


class Cached(list[dict[str, str]]):
    cache_files = ({"filename": f"/cache/Salesforce___wikitext/0.0.0/{COMMIT}/wikitext-test.arrow"},)


def test_a_cached_data_set_serves_offline_and_tells_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_hub)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Cached([{"text": "row"}]))
    assert open_corpus(source("wikitext2", split="test")).provenance["revision"] == COMMIT
    assert open_corpus(source("wikitext2", split="test", revision=COMMIT[:7])).provenance["revision"] == COMMIT
    with pytest.raises(ResourceError, match=f"revision={'f' * 40}: the hub cannot be reached, and the cache holds"):
        open_corpus(source("wikitext2", split="test", revision="f" * 40))


def test_c4_is_streamed_and_a_broken_connection_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def stream() -> object:
        for number in range(3):
            served.append(number)
            yield {"text": f"document {number}"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, streaming, **__: stream() if streaming else None)
    texts = open_corpus(source("c4", split="train")).documents
    assert next(texts) == "document 0"
    assert served == [0]
    with pytest.raises(ResourceError, match="reset by peer"):
        list(texts)


@pytest.mark.network
def test_wikitext2_from_the_hub_has_the_rows_that_everybody_counts() -> None:
    corpus = open_corpus(source("wikitext2", split="test"))
    rows = list(corpus.documents)
    assert len(rows) == 4358
    assert rows[:2] == ["", " = Robert Boulter = \n"]
    assert len(corpus.provenance["revision"]) == 40


@pytest.mark.network
def test_c4_from_the_hub_streams() -> None:
    corpus = open_corpus(source("c4", split="train"))
    assert len(next(corpus.documents)) > 10
    assert len(corpus.provenance["revision"]) == 40
