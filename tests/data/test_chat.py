"""Conversations become text through the tokenizer's chat template, whichever of the three conventions they follow."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny_models import write_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from jointq_cli.data.calibration import Calibration, calibration_tokens, evaluation_ids
from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.errors import TextError

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
)
QUESTION, ANSWER = "Is it raining?", "No."
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
ROWS = {
    "messages": {"messages": MESSAGES},
    "conversations": {"conversations": SHAREGPT},
    "meta.chat": {"meta": {"chat": MESSAGES}},
    "instruction+input+output": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "instruction,input,output": {"instruction": QUESTION, "input": None, "output": ANSWER},
}
EXPECTED = f"[user]{QUESTION}</s>[assistant]{ANSWER}</s>"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """With a chat template, and a BOS before each text."""
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False)
    tokenizer.chat_template = TEMPLATE
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_rows(file: Path, rows: list[dict[str, object]]) -> str:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ROWS)
def test_every_custom_gives_the_text_of_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: str, suffix: str
) -> None:
    path = write_rows(tmp_path / f"chat.{suffix}", [ROWS[column]] * 3)
    config = Calibration("text", path, column=column, num_samples=1, seqlen=16)
    tokens = calibration_tokens(config, tokenizer)
    expected = tokenizer(EXPECTED * 3, add_special_tokens=False)["input_ids"]
    assert tokens.windows[0].tolist() == expected[:16]  # neither a BOS nor a separator is added to the template's own
    assert len(tokens.provenance["chat_template_sha256"]) == 64
    assert "through the chat template" in tokens.describe()
    ids, provenance = evaluation_ids(config, tokenizer)
    assert torch.equal(ids, torch.tensor(expected))
    assert provenance["chat_template_sha256"] == tokens.provenance["chat_template_sha256"]


def test_an_input_stands_below_its_instruction_and_a_row_without_an_answer_is_skipped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        {"instruction": "Add.", "input": "", "output": " "},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
    ]
    config = Calibration(
        "text", write_rows(tmp_path / "a.jsonl", rows), column="instruction+input+output", num_samples=1, seqlen=16
    )
    ids, _ = evaluation_ids(config, tokenizer)
    assert ids.tolist() == tokenizer("[user]Add.\n\n1 2</s>[assistant]3</s>", add_special_tokens=False)["input_ids"]


def test_a_text_column_is_not_said_to_be_a_chat(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = Calibration("text", write_rows(tmp_path / "a.jsonl", [{"text": "word " * 9}]), num_samples=1, seqlen=16)
    tokens = calibration_tokens(config, tokenizer)
    assert "chat_template_sha256" not in tokens.provenance
    assert "template" not in tokens.describe()
    assert tokens.windows[0, 0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([{"role": "tool", "content": "x"}], "refuses a conversation of tool .unknown role tool"),
        (["a", "b"], "holds list there, not text or messages"),
        ([{"name": "x"}], "holds list there, not text or messages"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cell: list[object], message: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": cell}])
    with pytest.raises(TextError, match=message) as caught:
        calibration_tokens(Calibration("text", path, column="messages"), tokenizer)
    assert str(caught.value).startswith("calibration.column=messages: ")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused_in_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = None
    path = write_rows(tmp_path / "a.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(TextError, match="tokenizer has no chat template") as caught:
        calibration_tokens(Calibration("text", path, column="messages"), tokenizer)
    assert str(caught.value).startswith("calibration.column=messages: ")
    assert "\n" not in str(caught.value)
