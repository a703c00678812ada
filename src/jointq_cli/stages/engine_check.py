"""Whether an export predicts in its engine what the dequantised checkpoint predicts in float32."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from jointq_cli.errors import ModelError
from jointq_cli.evaluation.engines import ENGINES, EnginePredictions, opened
from jointq_cli.evaluation.perplexity import HiddenPredictions, compare, score
from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.formats.export import Exporter, QuantizedModel
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.sources import gguf_in
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import EngineCheck
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.engine import tokenizer_problems
from jointq_cli.stages.export import FILES, Export, quantized_model
from jointq_cli.stages.plan.costs import Workload
from jointq_cli.stages.quantize import Quantized, open_quantized
from jointq_cli.system.record_json import encode, load_record

WINDOWS = 8
MOST_BYTES = 1e9  # of the weights of a model that is tried
CHECK = "engine_check.json"


def is_checked(exporter: Exporter, model: QuantizedModel) -> bool:
    """Whether the engine of this format reads this model and is installed, and the model small enough: engines load all
    of it, and transformers took eight times the bytes of a model of 1.2 B parameters to decode it."""
    if model.checkpoint.weight_bytes > MOST_BYTES or not exporter.engine_reads(model):
        return False
    needed = (ENGINES[exporter.engine].module, *exporter.engine_needs)
    return all(importlib.util.find_spec(module) is not None for module in needed)


def check_all(
    context: Context,
    model: StreamedModel,
    quantized: Quantized,
    exports: list[Export],
    tokenizer: PreTrainedTokenizerBase,
    windows: ScoredWindows,
) -> list[Export]:
    """The exports, with the results of their checks where their engines are installed. model: the one that was
    quantised."""
    layers = [layer.name for layer in quantized.layers]
    result = quantized_model(model, quantized.checkpoint, layers, quantized.codes)

    def checked(export: Export) -> Export:
        if not is_checked(export.exporter, result):
            return export
        stage = check_stage(export.stage, quantized.stage, model, layers, export.exporter, tokenizer, windows)
        try:
            found: EngineCheck = load_record(EngineCheck, context.run(stage).path / CHECK)
        except ModelError as error:  # after hours of work: the other results are not lost for it
            if context.team.size > 1:  # the other processes have stopped
                raise
            found = failed_check(export.exporter, error)
        return replace(export, record=replace(export.record, check=found))

    return [checked(export) for export in exports]


def check_stage(
    export: Stage,
    quantize: Stage,
    model: StreamedModel,
    layers: list[str],
    exporter: Exporter,
    tokenizer: PreTrainedTokenizerBase,
    windows: ScoredWindows,
) -> Stage:
    """export: the stage that writes `exporter`'s files of the result of the stage `quantize`, which quantises `layers`
    of `model`."""
    first = windows.part(slice(WINDOWS))

    def make(scratch: Path, context: Context) -> None:
        def write() -> None:
            checkpoint = open_quantized(context, quantize, layers).checkpoint
            reference = StreamedModel(checkpoint, context.device, torch.float32, model.trust_remote_code)
            files = context.directory(export) / FILES
            found = check_in_engine(exporter, files, reference, tokenizer, first, context.pause)
            (scratch / CHECK).write_text(encode(found), encoding="utf-8")

        context.team.on_rank0(write)

    return Stage(
        name=f"check {exporter.label} in {exporter.engine}",
        kind="engine_check",
        spec={
            "engine": ENGINES[exporter.engine].version,
            "needs": [version(packages_distributions()[module][0]) for module in exporter.engine_needs],
            "device": model.device.type,
        },
        inputs=(export.key, first.hash),
        make=make,
        cost=Workload.engine_check,
        together=True,
    )


def failed_check(exporter: Exporter, error: ModelError) -> EngineCheck:
    """Where the engine cannot load or compute the export."""
    problem = f"export {exporter.label} in {exporter.engine}: {error}"
    return EngineCheck(exporter.engine, 0, math.nan, math.nan, [problem])


def check_in_engine(
    exporter: Exporter,
    directory: Path,
    reference: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: ScoredWindows,
    pause: Callable[[], None] = lambda: None,
) -> EngineCheck:
    """reference: the dequantised checkpoint in float32. Raises as `opened` does.

    Engines compute in the checkpoint's dtype: what jointq itself differs by in that dtype is allowed twice over.
    """
    checkpoint = reference.checkpoint
    rounded = StreamedModel(checkpoint, reference.device, checkpoint.dtype, reference.trust_remote_code)
    expected, own = (
        HiddenPredictions(model, final_hidden(model, windows.ids, 1, pause=pause)) for model in (reference, rounded)
    )
    rounding = compare(score(expected, own, windows, pause))
    name = exporter.engine
    with opened(name, gguf_in(directory)) as model:
        problems = tokenizer_problems(name, model, tokenizer, windows)
        found = compare(score(expected, EnginePredictions(model, windows), windows, pause))
    change = math.expm1(found.nll_increase)
    most = max(exporter.engine_kl, 2 * rounding.kl_divergence)
    if not found.kl_divergence <= most:
        problems.append(f"KL {found.kl_divergence:.2g} from the checkpoint, and {most:.2g} is the limit")
    noise = math.expm1(2 * found.nll_increase_standard_error) if len(windows.ids) > 1 else math.inf
    most = max(exporter.engine_change, 2 * abs(math.expm1(rounding.nll_increase)), noise)
    if not abs(change) <= most:
        problems.append(f"perplexity {100 * change:+.2g} % from the checkpoint's, and {100 * most:.2g} % is the limit")
    return EngineCheck(
        engine=f"{name} ({ENGINES[name].version})",
        windows=len(windows.ids),
        kl_divergence=found.kl_divergence,
        perplexity_change=change,
        problems=[f"export {exporter.label} in {name}: {problem}" for problem in problems],
    )
