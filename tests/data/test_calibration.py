"""Laws of the windows (real, consecutive, reproducible tokens); contracts of frozen tokens and tokenizers."""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from jointq_cli.data.calibration import STRATEGIES, Calibration, TokenizedCorpus, calibration_tokens, evaluation_ids
from jointq_cli.data.text import Corpus, TextSource
from jointq_cli.data.token_file import Tokens, load_tokens, save_tokens
from jointq_cli.data.tokenizer import load_tokenizer, tokenizer_hash
from jointq_cli.errors import ConfigError, ModelError, ResourceError, TextError
from jointq_cli.setting_rules import rule_of

WORDS = [f"w{number}" for number in range(200)]
BLANK, PAD, BOS, EOS = range(4)  # a blank line is a token of its own, the words begin at 4
FIVE_NEWLINES = 204


def tokenizer(bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word. Its file asks for padding and truncation, as some of the hub do."""
    names = ["\n\n", "<pad>", "<s>", "</s>", *WORDS, "\n" * 5]
    backend = Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.enable_padding(pad_id=PAD, pad_token="<pad>", length=64)
    backend.enable_truncation(8)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        model_max_length=8,
    )


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return tokenizer()


def text(start: int, length: int) -> str:
    """Consecutive words, so that every id shows the place it came from."""
    return " ".join(WORDS[start : start + length])


def write(folder: Path, *texts: str) -> str:
    for number, content in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(content)
    return str(folder / "*.txt")


def config(path: str | None, **changes: object) -> Calibration:
    base = Calibration(
        "text", path, None, "all", None, None, 4, 5, 0, "concat_chunk", None, "original", "uniform", 2.0, 1.0
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def is_slice(window: Tensor, ids: Tensor) -> bool:
    places = range(len(ids) - len(window) + 1)
    return any(torch.equal(window, ids[start : start + len(window)]) for start in places)


@pytest.fixture
def three_documents(tmp_path: Path) -> str:
    """Of 30, 3 and 20 words."""
    return write(tmp_path, text(0, 30), text(40, 3), text(50, 20))


# --- properties


def test_every_strategy_that_a_recipe_may_name_exists() -> None:
    [field] = [field for field in dataclasses.fields(Calibration) if field.name == "strategy"]
    assert rule_of(field).choices == tuple(STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bos", [False, True])
def test_every_window_is_complete_consecutive_and_without_padding(
    three_documents: str, strategy: str, bos: bool
) -> None:
    ours = tokenizer(bos)
    windows = calibration_tokens(config(three_documents, strategy=strategy), ours).windows
    complete = [list(range(4, 34)), list(range(44, 47)), list(range(54, 74))]
    documents = [torch.tensor([BOS, *ids] if bos else [*ids, EOS]) for ids in complete]
    sources = [torch.cat(documents)] if strategy.startswith("concat") else documents
    assert windows.shape[1] == 5
    assert windows.dtype == torch.int64
    assert not (windows == PAD).any()
    assert all(any(is_slice(window, ids) for ids in sources) for window in windows)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seqlen=st.integers(1, 12),
    num_samples=st.integers(1, 12),
    strategy=st.sampled_from(list(STRATEGIES)),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60, deadline=None)
def test_a_text_gives_as_many_windows_as_fit_up_to_the_requested_number(
    lengths: list[int], seqlen: int, num_samples: int, strategy: str, seed: int
) -> None:
    texts = [text(5 * number, length) for number, length in enumerate(lengths)]
    stream = sum(lengths) + len(lengths)
    held = {
        "concat_chunk": stream // seqlen,
        "concat_rand": max(0, stream - seqlen + 1),
        "drop_head": sum(length >= seqlen for length in lengths),
        "drop_rand": sum(length >= seqlen for length in lengths),
    }[strategy]
    reading = TokenizedCorpus(Corpus(iter(texts), {}), tokenizer())
    requested = config("*.txt", num_samples=num_samples, seqlen=seqlen, strategy=strategy, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if not held:
        with pytest.raises(TextError, match=f"calibration.seqlen={seqlen}: "):
            STRATEGIES[strategy](reading, requested, generator)
        return
    windows = STRATEGIES[strategy](reading, requested, generator)
    assert windows.shape == (min(held, num_samples), seqlen)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_tokens(
    three_documents: str, plain: PreTrainedTokenizerFast, strategy: str
) -> None:
    first, second = (calibration_tokens(config(three_documents, strategy=strategy, seed=7), plain) for _ in range(2))
    assert first.hash == second.hash
    assert first.provenance == second.provenance


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_seed_moves_random_windows_and_no_others(
    three_documents: str, plain: PreTrainedTokenizerFast, strategy: str
) -> None:
    hashes = {
        calibration_tokens(config(three_documents, strategy=strategy, seed=seed), plain).hash for seed in range(4)
    }
    assert (len(hashes) > 1) == strategy.endswith("rand")


def test_random_windows_start_at_distinct_places(three_documents: str, plain: PreTrainedTokenizerFast) -> None:
    # 53 words and three EOS have 52 windows of five tokens, each with ids of its own.
    requested = config(three_documents, strategy="concat_rand", num_samples=100)
    windows = calibration_tokens(requested, plain).windows
    assert len(windows) == len(windows.unique(dim=0)) == 52


def test_consecutive_windows_are_the_text_cut_without_gaps(
    three_documents: str, plain: PreTrainedTokenizerFast
) -> None:
    windows = calibration_tokens(config(three_documents, num_samples=8), plain).windows
    stream = [*range(4, 34), EOS, *range(44, 47), EOS, *range(54, 74), EOS]
    assert windows.flatten().tolist() == stream[:40]


@pytest.mark.parametrize("strategy", ["drop_head", "drop_rand"])
def test_short_documents_are_dropped(three_documents: str, plain: PreTrainedTokenizerFast, strategy: str) -> None:
    tokens = calibration_tokens(config(three_documents, strategy=strategy), plain)
    assert len(tokens.windows) == 2
    assert [int(window[0]) < 34 for window in tokens.windows] == [True, False]
    if strategy == "drop_head":
        assert tokens.windows[:, 0].tolist() == [4, 54]


@pytest.mark.parametrize(
    ("ours", "between"),
    [(tokenizer(bos=True), BOS), (tokenizer(), EOS), (tokenizer(eos=False), BLANK)],
    ids=["bos", "eos", "blank line"],
)
def test_documents_are_separated_as_the_tokenizer_does(
    tmp_path: Path, ours: PreTrainedTokenizerFast, between: int
) -> None:
    requested = config(write(tmp_path, text(0, 3), text(10, 3)), num_samples=1, seqlen=7)
    [window] = calibration_tokens(requested, ours).windows.tolist()
    words = [4, 5, 6, between, 14, 15, 16]
    assert window == ([BOS, *words[:-1]] if between == BOS else words)


def test_the_rows_of_wikitext_are_joined_by_a_blank_line_and_encoded_at_once(tmp_path: Path) -> None:
    # The rows are "w0 \n", "" and " w1 w2": their own newline and two blank lines stand between the words.
    (tmp_path / "wiki.raw").write_text("w0 \n \n w1 w2")
    path, ours = str(tmp_path / "wiki.raw"), tokenizer(bos=True)
    requested = config(path, dataset="wikitext2", split="test", num_samples=1, seqlen=5)
    ids, provenance = evaluation_ids(requested, ours)
    assert ids.tolist() == [4, FIVE_NEWLINES, 5, 6]
    assert provenance["documents"] == "3"
    assert calibration_tokens(requested, ours).windows.tolist() == [[BOS, *ids.tolist()]]


# --- how much is read


def endless() -> Iterator[str]:
    while True:
        yield text(0, 9)


def test_a_stream_is_read_as_far_as_is_needed(plain: PreTrainedTokenizerFast) -> None:
    read = {}
    for strategy in STRATEGIES:
        reading = TokenizedCorpus(Corpus(endless(), {}, streamed=True), plain)
        requested = config("*.txt", strategy=strategy, num_samples=10, seqlen=5)
        windows = STRATEGIES[strategy](reading, requested, torch.Generator().manual_seed(0))
        assert windows.shape == (10, 5)
        read[strategy] = len(reading.documents_read)
    assert read == {"concat_chunk": 5, "concat_rand": 20, "drop_head": 10, "drop_rand": 10}


def test_the_search_for_long_documents_in_a_stream_ends(plain: PreTrainedTokenizerFast) -> None:
    reading = TokenizedCorpus(Corpus(endless(), {}, streamed=True), plain)
    requested = config("*.txt", strategy="drop_head", num_samples=2, seqlen=10)
    with pytest.raises(TextError, match="the longest of 143 documents of text/all has 9 tokens"):
        STRATEGIES["drop_head"](reading, requested, torch.Generator())


def test_an_evaluation_text_of_c4_is_its_first_documents_joined_by_a_space(
    plain: PreTrainedTokenizerFast,
) -> None:
    reading = TokenizedCorpus(Corpus(endless(), {}, joint=" ", streamed=True, evaluated=3), plain)
    assert reading.running_text(special=False).tolist() == [*range(4, 13)] * 3
    assert len(reading.documents_read) == 3


# --- evaluation


def test_evaluation_ids_are_the_joined_text_without_bos_eos_padding_or_truncation(tmp_path: Path) -> None:
    path = write(tmp_path, text(0, 30) + " ", " " + text(40, 3))
    ids, provenance = evaluation_ids(TextSource("text", path, None, "all", None, None), tokenizer(bos=True))
    assert ids.tolist() == [*range(4, 34), BLANK, *range(44, 47)]
    assert ids.dtype == torch.int64
    assert provenance["documents"] == "2"
    assert provenance["text_tokens"] == "34"
    assert len(provenance["text_sha256"]) == 64


def test_a_text_longer_than_the_context_is_not_warned_about(
    three_documents: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = tokenizer()  # a fresh one, since each warns once
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        calibration_tokens(config(three_documents), ours)
        evaluation_ids(config(three_documents), ours)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


# --- messages and provenance


def test_too_few_windows_are_a_warning_that_is_kept(three_documents: str, plain: PreTrainedTokenizerFast) -> None:
    tokens = calibration_tokens(config(three_documents, num_samples=40), plain)
    assert tokens.windows.shape == (11, 5)
    assert tokens.warning == "calibration.num_samples=40: the text gives only 11 windows of 5 tokens"
    assert tokens.provenance["num_samples"] == "11"
    assert calibration_tokens(config(three_documents), plain).warning == ""


def test_overlapping_random_windows_are_a_warning(three_documents: str, plain: PreTrainedTokenizerFast) -> None:
    tokens = calibration_tokens(config(three_documents, num_samples=12, strategy="concat_rand"), plain)
    assert tokens.warning.endswith("windows of 5 tokens overlap, the text has only 56 tokens")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_text_too_short_for_one_window_says_what_there_is_and_what_to_change(
    three_documents: str, plain: PreTrainedTokenizerFast, strategy: str
) -> None:
    with pytest.raises(TextError) as caught:
        calibration_tokens(config(three_documents, seqlen=99, strategy=strategy), plain)
    there = "has only 56 tokens" if strategy.startswith("concat") else "the longest of 3 documents"
    assert str(caught.value).startswith("calibration.seqlen=99: ")
    assert there in str(caught.value)
    assert "lower calibration.seqlen or" in str(caught.value)


def test_provenance_tells_text_tokenizer_and_cut(three_documents: str, plain: PreTrainedTokenizerFast) -> None:
    tokens = calibration_tokens(config(three_documents), plain)
    provenance = tokens.provenance
    assert provenance["files"] == "00.txt 01.txt 02.txt"
    assert (provenance["dataset"], provenance["split"], provenance["revision"]) == ("text", "all", "local")
    assert (provenance["strategy"], provenance["seed"], provenance["num_samples"], provenance["seqlen"]) == (
        "concat_chunk",
        "0",
        "4",
        "5",
    )
    assert provenance["documents"] == "1"  # of three: no more were needed
    assert provenance["tokenizer_sha256"] == tokenizer_hash(plain)
    assert tokens.describe() == f"text/all 4 x 5 tokens concat_chunk seed 0 tokens={tokens.hash[:16]}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, r"calibration\.num_samples=0: must be at least 1"),
        ({"seqlen": 0}, r"calibration\.seqlen=0: must be at least 1"),
        ({"seed": -1}, r"calibration\.seed=-1: must be from 0"),
        (
            {"strategy": "concat"},
            r"calibration\.strategy=concat: must be one of concat_chunk, concat_rand, drop",
        ),
        ({"token_weighting": "rms"}, r"calibration\.token_weighting=rms: must be one of uniform, input, residual"),
        ({"token_power": -1.0}, r"calibration\.token_power=-1\.0: must be from 0 to 4"),
        ({"first_token_weight": math.inf}, r"calibration\.first_token_weight=inf: must be from 0 to 4"),
        ({"inputs": "both"}, r"calibration\.inputs=both: must be original or quantized"),
        ({"dataset": "c5"}, r"calibration\.dataset=c5: must be one of pydoc, text, wikitext2, c4"),
    ],
)
def test_a_value_out_of_range_is_a_config_error(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("a.txt", **change)


# --- frozen tokens


@pytest.fixture
def frozen(tmp_path: Path, plain: PreTrainedTokenizerFast) -> Path:
    (tmp_path / "texts").mkdir()
    tokens = calibration_tokens(config(write(tmp_path / "texts", text(0, 30))), plain)
    save_tokens(tmp_path / "deep" / "tokens.safetensors", tokens)
    return tmp_path / "deep" / "tokens.safetensors"


def test_frozen_tokens_come_back_as_they_were(frozen: Path, plain: PreTrainedTokenizerFast) -> None:
    original = calibration_tokens(config(str(frozen.parent.parent / "texts" / "*.txt")), plain)
    loaded = load_tokens(frozen, plain)
    assert torch.equal(loaded.windows, original.windows)
    assert loaded.provenance == original.provenance
    assert [file.name for file in frozen.parent.iterdir()] == ["tokens.safetensors"]


def test_frozen_tokens_are_the_same_bytes_each_time(frozen: Path, plain: PreTrainedTokenizerFast) -> None:
    loaded = load_tokens(frozen, None)
    shuffled = dict(reversed(loaded.provenance.items()))
    save_tokens(frozen.with_name("again"), Tokens(loaded.windows, shuffled))
    assert frozen.with_name("again").read_bytes() == frozen.read_bytes()


def test_a_run_takes_frozen_tokens_instead_of_the_text(frozen: Path, plain: PreTrainedTokenizerFast) -> None:
    complete = load_tokens(frozen, plain)
    few = calibration_tokens(config("nowhere.txt", tokens=str(frozen), num_samples=2), plain)
    many = calibration_tokens(config("nowhere.txt", tokens=str(frozen), num_samples=9), plain)
    assert torch.equal(few.windows, complete.windows[:2])
    assert few.warning == ""
    assert torch.equal(many.windows, complete.windows)
    assert many.warning == "calibration.num_samples=9: tokens.safetensors has only 4 windows"
    with pytest.raises(TextError, match=r"calibration\.seqlen=6: the windows of .* have 5 tokens"):
        calibration_tokens(config("nowhere.txt", tokens=str(frozen), seqlen=6), plain)


def test_tokens_of_another_tokenizer_are_refused_with_both_named(frozen: Path, plain: PreTrainedTokenizerFast) -> None:
    other = tokenizer(bos=True)
    with pytest.raises(TextError) as caught:
        load_tokens(frozen, other)
    assert tokenizer_hash(plain)[:16] in str(caught.value)
    assert tokenizer_hash(other)[:16] in str(caught.value)


@pytest.mark.parametrize("id", [-1, 205])
def test_ids_that_the_tokenizer_lacks_are_refused(tmp_path: Path, plain: PreTrainedTokenizerFast, id: int) -> None:
    tokens = Tokens(torch.tensor([[4, id]]), {"tokenizer_sha256": tokenizer_hash(plain)})
    save_tokens(tmp_path / "tokens", tokens)
    with pytest.raises(TextError, match=rf"has ids from .*{id}.*, but the tokenizer knows 0 to 204"):
        load_tokens(tmp_path / "tokens", plain)


def test_a_file_without_frozen_tokens_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    with pytest.raises(TextError, match=r"calibration\.tokens=.*: no such file"):
        load_tokens(file, None)
    file.write_text("nonsense")
    with pytest.raises(TextError, match="is not a file of frozen tokens"):
        load_tokens(file, None)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(TextError, match="is not a file of frozen tokens"):
        load_tokens(file, None)
    for windows in (
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.int64),
    ):
        save_file({"windows": windows}, file, {"provenance": json.dumps({})})
        with pytest.raises(TextError, match=r"windows must be int64 of shape \(number, tokens\)"):
            load_tokens(file, None)


def test_an_unwritable_place_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        save_tokens(tmp_path / "file" / "tokens", Tokens(torch.zeros(1, 1, dtype=torch.int64), {}))


# --- tokenizers


def test_the_hash_of_a_tokenizer_does_not_depend_on_its_path(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    plain.save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    hashes = {tokenizer_hash(load_tokenizer(tmp_path / place, False)) for place in ("here", "there")}
    assert hashes == {tokenizer_hash(plain)}


def test_use_leaves_the_hash_of_a_tokenizer_alone() -> None:
    ours = tokenizer()
    before = tokenizer_hash(ours)
    ours("w0 w1", padding="max_length", truncation=True, max_length=4)
    assert tokenizer_hash(ours) == before


def test_what_changes_the_ids_changes_the_hash() -> None:
    more = tokenizer()
    more.add_tokens(["w0w1"])
    assert len({tokenizer_hash(ours) for ours in (tokenizer(), more, tokenizer(bos=True), tokenizer(eos=False))}) == 4


def test_a_directory_without_a_usable_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(tmp_path, False)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match="has no vocabulary"):
        load_tokenizer(tmp_path, False)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path, False)
    assert "\n" not in str(caught.value)


@pytest.mark.network
@pytest.mark.parametrize(("dataset", "split"), [("wikitext2", "train"), ("c4", "train")])
def test_the_hub_gives_windows_whose_commit_is_recorded(
    plain: PreTrainedTokenizerFast, dataset: str, split: str
) -> None:
    requested = Calibration(dataset, None, None, split, None, None, 2, 64, 0, "concat_rand", None, "original")
    tokens = calibration_tokens(requested, plain)
    assert tokens.windows.shape == (2, 64)
    assert len(tokens.provenance["revision"]) == 40
