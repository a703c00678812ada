"""A Hugging Face tokenizer as the keys of a GGUF file, from which llama.cpp tokenizes by itself.

Byte-level BPE has its vocabulary, its merges and the name of its pre-tokenizer, a regular expression that llama.cpp has
built in. BPE over characters with bytes as fallback (converted SentencePiece: Llama 2, Mistral, Gemma) has a score per
token in place of merges.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from jointq_cli.errors import ConfigError

if TYPE_CHECKING:  # transformers takes more than a second to import
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The parts of a pre-tokenizer -> llama.cpp's name of it.
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
}
_SPACE = "\u2581"  # SentencePiece's
UNSCORED = -1e6  # of characters and bytes, which no merge makes


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says of its tokenizer. pre: the pre-tokenizer's name, None for SentencePiece's algorithm."""

    tokens: list[str]
    types: list[TokenType]
    pre: str | None
    merges: list[str]
    scores: list[float]
    prepends_space: bool

    def write(self, writer: GGUFWriter, tokenizer: "PreTrainedTokenizerBase") -> None:
        writer.add_tokenizer_model("llama" if self.pre is None else "gpt2")
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.pre is None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prepends_space)
        else:
            writer.add_token_merges(self.merges)
        for name in ("bos", "eos", "unk", "pad"):
            token_id = getattr(tokenizer, f"{name}_token_id")
            if token_id is not None:
                getattr(writer, f"add_{name}_token_id")(token_id)
        encoded = tokenizer("a").input_ids
        writer.add_add_bos_token(tokenizer.bos_token_id is not None and encoded[0] == tokenizer.bos_token_id)
        writer.add_add_eos_token(tokenizer.eos_token_id is not None and encoded[-1] == tokenizer.eos_token_id)
        if isinstance(tokenizer.chat_template, str):
            writer.add_chat_template(tokenizer.chat_template)


def read_tokenizer(tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> GgufTokenizer:
    """vocabulary: rows of the embedding, which may be more than there are tokens.

    Raises ConfigError where llama.cpp has no such tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"export=gguf: {type(tokenizer).__name__} is no tokenizer with a tokenizer.json")
    # Of the tokenizer as it is loaded: some classes of transformers replace parts of the file.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ConfigError(f"export=gguf: the model's tokenizer is a {model.get('type')} one; only BPE is supported")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    by_characters = bool(model.get("byte_fallback"))
    pre = None if by_characters else _pre_tokenizer(content)
    tokens, types = _tokens(content, vocabulary, by_characters)
    rank = {merge.replace(" ", "", 1): number for number, merge in reversed(list(enumerate(merges)))}
    scores = [-float(rank[token]) if token in rank else UNSCORED for token in tokens] if by_characters else []
    return GgufTokenizer(tokens, types, pre, merges, scores, _prepends_space(content))


def _pre_tokenizer(content: dict[str, Any]) -> str:
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        kind = content["normalizer"]["type"]
        raise ConfigError(f"export=gguf: the tokenizer normalises text ({kind}), which llama.cpp does not do for BPE")
    parts = content.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    found = tuple(_pattern(part) for part in parts if _pattern(part))
    if found not in PRE_TOKENIZERS:
        names = ", ".join(PRE_TOKENIZERS.values())
        raise ConfigError(f"export=gguf: the tokenizer splits text in a way of its own; known are those of {names}")
    return PRE_TOKENIZERS[found]


def _pattern(part: dict[str, Any]) -> str:
    """What a part of the pre-tokenizer splits by: its kind, its regular expression, or "" where it splits nothing."""
    kind = str(part.get("type"))
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return str(part["pattern"].get("Regex"))
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return kind if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return kind
    return json.dumps(part)


def _prepends_space(content: dict[str, Any]) -> bool:
    """Whether a text begins with a space that it does not have, as SentencePiece's."""
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    pre_tokenizer = content.get("pre_tokenizer") or {}
    metaspace = pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") != "never"
    return metaspace or any(step.get("type") == "Prepend" for step in steps)


def _tokens(content: dict[str, Any], vocabulary: int, by_characters: bool) -> tuple[list[str], list[TokenType]]:
    by_id = {number: token for token, number in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    unknown = content["model"].get("unk_token")
    tokens, types = [], []
    for number in range(vocabulary):
        if number in added:
            token = added[number]["content"]
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
            token = token.replace(_SPACE, " ") if kind == TokenType.USER_DEFINED else token
        elif number in by_id:
            token, kind = by_id[number], TokenType.NORMAL
        else:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        if by_characters and token == unknown:
            kind = TokenType.UNKNOWN
        elif by_characters and kind == TokenType.NORMAL and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types
