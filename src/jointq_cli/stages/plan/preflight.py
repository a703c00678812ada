"""Preflight warnings: valid settings that usually give poor results.

Shown by `plan` and by the command itself before it computes, one line each, with the key to change. Knows sizes only.
"""

import math
from collections.abc import Mapping
from typing import Any

from jointq_cli.data.calibration import Calibration
from jointq_cli.data.overlap import windows_in
from jointq_cli.data.token_file import Tokens
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows
from jointq_cli.formats.k_quant import SUPER_BLOCK
from jointq_cli.models.identity import dequantised_from, quantised_by
from jointq_cli.models.k_mixes import FALLBACKS
from jointq_cli.models.layer_selection import find_uncalled
from jointq_cli.models.skeleton import find_language_model, text_state
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.overrides import fitting
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.recipe import EvaluateRecipe, Recipe
from jointq_cli.records import FULL_COVERAGE
from jointq_cli.report.number_format import listed
from jointq_cli.stages.export import check_exports, model_to_quantize
from jointq_cli.stages.loop_settings import asked_for
from jointq_cli.stages.plan.model_sizes import Shapes

LEAST_TOKENS_PER_COLUMN = 4  # of calibration; with fewer than one the Hessian is singular
SHARED = 0.1  # of a window's runs of 32 tokens; less is boilerplate that texts of one kind share
LEAST_SCORED = 4000  # tokens; with fewer the standard error of a perplexity is about ten percent


def preflight_warnings(
    recipe: Recipe, model: StreamedModel, shapes: Shapes, calibrated: int, scored: int | None = None
) -> list[str]:
    """calibrated, scored: numbers of tokens; scored is None where the text is still to be downloaded."""
    found = [
        *model.checkpoint.warnings,
        _quantised_before(model),
        _dequantised(model),
        _only_language_model(model),
        _left_out(shapes),
        _uncalled(model),
        _unsplit_experts(model),
        *_beyond_positions(model, {"calibration": recipe.calibration.seqlen, "evaluation": recipe.evaluation.seqlen}),
        _few_tokens(calibrated, shapes),
        _short_text(recipe.evaluation, scored),
        _untied(recipe, model, shapes),
        _head_left_out(recipe),
        _fallen_back(recipe, model),
    ]
    return [text for text in found if text]


def _only_language_model(model: StreamedModel) -> str:
    name = find_language_model(model.module)
    if not name:
        return ""
    of_text = text_state(model.module)
    others = [shape for stored, shape in model.source.shapes.items() if model.module_name(stored) not in of_text]
    share = sum(map(math.prod, others)) / model.checkpoint.parameters
    return (
        f"model: of {type(model.module).__name__} the language model alone ({name}) is quantised and evaluated, on "
        f"text alone; the rest, {100 * share:.2g} % of the parameters, stays as it is"
    )


def export_warnings(recipe: Recipe, model: StreamedModel, layers: Mapping[str, Quantizer]) -> list[str]:
    """layers: those to quantise, each with its quantizer. Raises ConfigError where a format of the recipe cannot hold
    the model."""
    if not recipe.exporters:
        return []
    online = [part for part in recipe.rotation.parts if part == "R4"]
    planned = model_to_quantize(model, layers)
    return check_exports(recipe.exporters, planned, online, recipe.activations.describe())


def evaluation_warnings(
    recipe: EvaluateRecipe, model: StreamedModel, reference: StreamedModel, scored: int
) -> list[str]:
    """Of `jointq evaluate`; scored: number of tokens."""
    models = [model] if reference is model else [model, reference]
    lengths = {"evaluation": recipe.evaluation.seqlen}
    files = [text for each in models for text in each.checkpoint.warnings]
    positions = [text for each in models for text in _beyond_positions(each, lengths)]
    short = _short_text(recipe.evaluation, scored)
    return list(dict.fromkeys([*files, *positions, *([short] if short else [])]))


def _quantised_before(model: StreamedModel) -> str:
    made = quantised_by(model.checkpoint)
    return f"model.path: jointq has quantised these weights already ({made}); use the original model" if made else ""


def _beyond_positions(model: StreamedModel, lengths: Mapping[str, int]) -> list[str]:
    """lengths: tokens of a window by part of the recipe."""
    config: Any = model.module.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return [
        f"{part}.seqlen={length}: more tokens than the model's max_position_embeddings={limit}; lower it"
        for part, length in lengths.items()
        if limit and length > limit
    ]


def shared_text(recipe: Recipe, tokens: Tokens | None, windows: ScoredWindows | None) -> list[str]:
    """A warning where the model is evaluated on text that it was calibrated on. None: not on this machine yet; then the
    settings alone are compared."""
    evaluation = recipe.evaluation
    key = f"evaluation.path={evaluation.path}" if evaluation.path else f"evaluation.split={evaluation.split}"
    if tokens is None or windows is None:
        found = "the text of calibration" if _same_source(recipe.calibration, evaluation) else ""
    elif count := int((windows_in(tokens.windows, windows.ids) >= SHARED).sum()):
        found = f"{count} of {len(windows.ids)} windows hold text of the calibration windows"
    else:
        hashes = [origin.get("text_sha256") for origin in (tokens.provenance, windows.provenance)]
        found = "the text of calibration, though other windows of it" if hashes[0] and len(set(hashes)) == 1 else ""
    return [f"{key}: {found}; the perplexity will be too good, evaluate on other text"] if found else []


def _same_source(calibration: Calibration, evaluation: Evaluation) -> bool:
    """Whether both settings name the same text."""
    if calibration.tokens:
        return False
    names = ("dataset", "path", "split", "config", "column", "revision")
    return all(getattr(calibration, name) == getattr(evaluation, name) for name in names)


def _left_out(shapes: Shapes) -> str:
    share = 1 - sum(shapes.left_out.values())
    if share >= FULL_COVERAGE:
        return ""
    kinds = ", ".join(f"{kind}: {part:.2g} %" for kind, part in _largest(shapes.left_out))
    return f"layers: only {100 * share:.2g} % of the weights of the blocks are quantised; left out are {kinds}"


def _uncalled(model: StreamedModel) -> str:
    kinds = {name.removeprefix(model.prefix(model.block_of(name) or 0)) for name in find_uncalled(model.module)}
    if not kinds:
        return ""
    return (
        f"layers: {', '.join(sorted(kinds))} cannot be quantised and is left out: the model uses its weight without "
        "calling the layer, so that its inputs cannot be seen"
    )


def _dequantised(model: StreamedModel) -> str:
    layout = dequantised_from(model.checkpoint)
    if not layout:
        return ""
    dtype = str(model.checkpoint.dtype).removeprefix("torch.")
    return (
        f"model: its weights are published in {layout}, and are dequantised to {dtype}: sizes and errors are compared "
        "with that model, which is larger than the published one"
    )


def _unsplit_experts(model: StreamedModel) -> str:
    if not model.unsplit_experts:
        return ""
    name, reason = next(iter(model.unsplit_experts.items()))
    others = len(model.unsplit_experts) - 1
    more = f" and {others} more are" if others else " is"
    return f"layers: {name}{more} left out: {reason}"


def _largest(left_out: Mapping[str, float]) -> list[tuple[str, float]]:
    """The kinds that have a percent of the weights at least, or the largest one; in percent."""
    parts = [(kind, 100 * part) for kind, part in left_out.items()]
    return [pair for pair in parts if pair[1] >= 1] or parts[:1]


def _few_tokens(calibrated: int, shapes: Shapes) -> str:
    """Experts receive a part of the tokens each; the fewest per column are judged."""
    least = min(shapes.inputs, key=lambda one: one.share / one.in_features)
    ratio = calibrated * least.share / least.in_features
    if ratio >= LEAST_TOKENS_PER_COLUMN:
        return ""
    whose = f", some {calibrated * least.share:.0f} for each expert," if least.experts else ""
    return (
        f"calibration.num_samples: {calibrated} tokens{whose} for layers of {least.in_features} columns are "
        f"{ratio:.2g} per column, and should be {LEAST_TOKENS_PER_COLUMN} at least; raise it"
    )


def _short_text(evaluation: Evaluation, scored: int | None) -> str:
    if scored is None or scored >= LEAST_SCORED:
        return ""
    key = "max_windows" if _is_cut(evaluation, scored) else "path" if evaluation.path else "dataset"
    return (
        f"evaluation.{key}: only {scored} tokens are scored, and perplexity needs some {LEAST_SCORED}; its error will "
        "be large"
    )


def _is_cut(evaluation: Evaluation, scored: int) -> bool:
    """Whether `max_windows` ends the text: all requested windows exist."""
    per_window = (evaluation.stride or evaluation.seqlen) - 1  # the first token of a text is not scored
    return evaluation.max_windows is not None and scored >= evaluation.max_windows * per_window


def _untied(recipe: Recipe, model: StreamedModel, shapes: Shapes) -> str:
    if not (shapes.is_tied and "R1" in recipe.rotation.parts):
        return ""
    grown = shapes.embedding * model.checkpoint.dtype.itemsize
    share = grown / model.checkpoint.weight_bytes
    return (
        f"rotation.r1=true: unties input and output embeddings, and the checkpoint grows by {grown / 1e6:,.0f} MB "
        f"({100 * share:.0f} %); rotation.r1=false keeps them tied"
    )


def _head_left_out(recipe: Recipe) -> str:
    if recipe.layers.exclude_layer_names:
        return ""
    return "layers.exclude_layer_names=[]: the head is not quantised all the same, nor is any layer outside the blocks"


def _fallen_back(recipe: Recipe, model: StreamedModel) -> str:
    """Layers that cannot be on the K grid that is asked for."""
    linear = model.linear_layers()
    asked = asked_for(model, recipe.layers, recipe.quantizer)
    found: dict[str, list[str]] = {}
    for name, quantizer in asked.items():
        if fitting(quantizer, linear[name].in_features) != quantizer:
            found.setdefault(getattr(quantizer, "grid", ""), []).append(name)
    if not found:
        return ""
    count = sum(map(len, found.values()))
    kinds = [f"{FALLBACKS[grid].upper()} for {grid.upper()} ({listed(names, 2)})" for grid, names in found.items()]
    return (
        f"layers: {count} of {len(asked)} have in_features that {SUPER_BLOCK} does not divide, and take what llama.cpp "
        f"takes then: {'; '.join(kinds)}"
    )
