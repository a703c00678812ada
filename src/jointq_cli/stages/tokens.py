"""Texts as tokens: what a run calibrates on, and what it evaluates on."""

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jointq_cli.data.calibration import Calibration, calibration_tokens, evaluation_ids
from jointq_cli.data.token_file import Tokens
from jointq_cli.data.tokenizer import tokenizer_hash
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows, cut_windows
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.stages.base import Context
from jointq_cli.stages.generated_tokens import generated_windows
from jointq_cli.stages.text_tokens import CALIBRATION, is_stored, read_stored, tokens_stage

EVALUATION = "evaluation tokens"


def load_calibration(
    context: Context, calibration: Calibration, model: StreamedModel, tokenizer: PreTrainedTokenizerBase
) -> Tokens:
    """The calibration windows. Those of the hub are stored, so that a run works offline once it has fetched them."""
    tokens = None
    if is_stored(calibration):
        tokens = read_stored(context.run(tokens_stage(calibration, tokenizer)).path, tokenizer)
    elif not calibration.is_generated:
        with context.timed(CALIBRATION):
            tokens = calibration_tokens(calibration, tokenizer)
    if calibration.generated:
        count, seqlen, seed = calibration.generated, calibration.seqlen, calibration.seed
        windows = generated_windows(context, model, tokenizer, count, seqlen, seed, tokens)
        tokens = with_generated(tokens, windows, calibration, model, tokenizer)
    assert tokens is not None
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


def with_generated(
    tokens: Tokens | None,
    windows: Tensor,
    calibration: Calibration,
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Tokens:
    """The windows of a text, if any, and those that the model has written, as continuations of these."""
    origin = {"generated_by": model.checkpoint.content_hash, "generated_seed": str(calibration.seed)}
    if tokens is not None:
        return tokens.with_generated(windows, {**origin, "generated_from": tokens.hash})
    provenance = {
        "dataset": calibration.dataset,
        "split": calibration.split,
        "strategy": "sampled",
        "seed": str(calibration.seed),
        "seqlen": str(calibration.seqlen),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }
    return Tokens(windows[:0], provenance).with_generated(windows, origin)
