"""Calibration windows of a text on the hub, kept in the store: which model they are for is no part of their key."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jointq_cli.data.calibration import Calibration, calibration_tokens
from jointq_cli.data.token_file import Tokens, load_tokens, save_tokens
from jointq_cli.data.tokenizer import tokenizer_hash
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.plan.costs import Windows

CALIBRATION = "calibration tokens"


def is_stored(calibration: Calibration) -> bool:
    """Whether these windows are cut from a text of the hub, and so kept in the store."""
    return calibration.is_on_hub and not calibration.tokens


def tokens_stage(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Stage:
    """Calibration windows of a text on the hub."""
    spec = calibration.tokens_only()

    def make(scratch: Path, context: Context) -> None:
        save_tokens(scratch / "tokens.safetensors", calibration_tokens(spec, tokenizer))

    windows = Windows(calibration.num_samples, calibration.seqlen)
    return Stage(CALIBRATION, "tokens", spec, (tokenizer_hash(tokenizer),), make, lambda load: load.text(windows))


def read_stored(directory: Path, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The result of `tokens_stage`."""
    return load_tokens(directory / "tokens.safetensors", tokenizer)
