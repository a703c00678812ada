"""Texts as tokens: what a run calibrates on, and what it evaluates on."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jointq_cli.data.calibration import Calibration, calibration_tokens, evaluation_ids
from jointq_cli.data.token_file import Tokens, load_tokens, save_tokens
from jointq_cli.data.tokenizer import tokenizer_hash
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows, cut_windows
from jointq_cli.stages.base import Context, Stage

CALIBRATION, EVALUATION = "calibration tokens", "evaluation tokens"


def load_calibration(context: Context, calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The calibration windows. Those of the hub are stored, so that a run works offline once it has fetched them."""
    if is_stored(calibration):
        tokens = read_stored(context.run(tokens_stage(calibration, tokenizer)).path, tokenizer)
    else:
        with context.timed(CALIBRATION):
            tokens = calibration_tokens(calibration, tokenizer)
    if tokens.warning:
        context.console.warn(tokens.warning)
    return tokens


def load_evaluation(context: Context, evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase) -> ScoredWindows:
    """The windows that models are scored on."""
    with context.timed(EVALUATION):
        return evaluation_windows(evaluation, tokenizer)


def evaluation_windows(evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase) -> ScoredWindows:
    ids, provenance = evaluation_ids(evaluation, tokenizer)
    return cut_windows(ids, evaluation, tokenizer.bos_token_id, provenance)


def is_stored(calibration: Calibration) -> bool:
    """Whether these windows are cut from a text of the hub, and so kept in the store."""
    return calibration.is_on_hub and not calibration.tokens


def tokens_stage(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Stage:
    """Calibration windows of a text on the hub."""
    spec = calibration.tokens_only()

    def make(scratch: Path, context: Context) -> None:
        save_tokens(scratch / "tokens.safetensors", calibration_tokens(spec, tokenizer))

    return Stage(CALIBRATION, "tokens", spec, (tokenizer_hash(tokenizer),), make)


def read_stored(directory: Path, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The result of `tokens_stage`."""
    return load_tokens(directory / "tokens.safetensors", tokenizer)
