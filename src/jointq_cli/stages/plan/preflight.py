"""What a person should know before hours of work: what is allowed, and will most likely be regretted.

Told by a plan and by the run itself, one line each, with the key to change. Knows sizes only.
"""

from typing import Any

from jointq_cli.evaluation.windows import Evaluation
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.recipe import Recipe
from jointq_cli.stages.plan.model_sizes import Shapes

LEAST_TOKENS_PER_COLUMN = 4  # of calibration: with fewer than one the Hessian is singular
LEAST_SCORED = 4000  # tokens: with fewer, perplexities are known to some ten percent


def preflight_warnings(
    recipe: Recipe, model: StreamedModel, shapes: Shapes, calibrated: int, scored: int | None = None
) -> list[str]:
    """calibrated, scored: tokens that there are; scored is None where the text has not been seen yet."""
    found = [
        *model.checkpoint.warnings,
        *_beyond_positions(recipe, model),
        _few_tokens(calibrated, shapes),
        _short_text(recipe, scored),
        _untied(recipe, model, shapes),
    ]
    return [text for text in found if text]


def _beyond_positions(recipe: Recipe, model: StreamedModel) -> list[str]:
    config: Any = model.module.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    lengths = {"calibration": recipe.calibration.seqlen, "evaluation": recipe.evaluation.seqlen}
    return [
        f"{part}.seqlen={length}: more tokens than the model's max_position_embeddings={limit}; lower it"
        for part, length in lengths.items()
        if limit and length > limit
    ]


def _few_tokens(calibrated: int, shapes: Shapes) -> str:
    if calibrated >= LEAST_TOKENS_PER_COLUMN * shapes.widest:
        return ""
    ratio = calibrated / shapes.widest
    return (
        f"calibration.num_samples: {calibrated} tokens for layers of {shapes.widest} columns are {ratio:.2g} per "
        f"column, and should be {LEAST_TOKENS_PER_COLUMN} at least; raise it"
    )


def _short_text(recipe: Recipe, scored: int | None) -> str:
    if scored is None or scored >= LEAST_SCORED:
        return ""
    key = "max_windows" if _is_cut(recipe.evaluation, scored) else "path" if recipe.evaluation.path else "dataset"
    return (
        f"evaluation.{key}: only {scored} tokens are scored, and perplexity needs some {LEAST_SCORED}; its error will "
        "be large"
    )


def _is_cut(evaluation: Evaluation, scored: int) -> bool:
    """Whether more of the text could be scored: all windows that were asked for are there."""
    of_a_window = (evaluation.stride or evaluation.seqlen) - 1  # the first token of a text is not scored
    return evaluation.max_windows is not None and scored >= evaluation.max_windows * of_a_window


def _untied(recipe: Recipe, model: StreamedModel, shapes: Shapes) -> str:
    if not (shapes.is_tied and "R1" in recipe.rotation.parts):
        return ""
    grown = shapes.embedding * model.checkpoint.dtype.itemsize
    share = grown / model.checkpoint.weight_bytes
    return (
        f"rotation.r1=true: parts input and output embeddings, and the checkpoint grows by {grown / 1e6:,.0f} MB "
        f"({100 * share:.0f} %); rotation.r1=false keeps them tied"
    )
