"""What the original and the quantised checkpoint write after a few prompts."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from jointq_cli.evaluation.generation import generate, prompt_ids, why_not
from jointq_cli.models.sampling import FAILURES
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import Generation
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.plan.costs import Workload
from jointq_cli.stages.quantize import Quantized, open_quantized

_FILE = "generated.json"


def generate_texts(
    context: Context,
    original: StreamedModel,
    quantized: Quantized,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[Generation]:
    """A text of each model per prompt; none, and a warning, where the models cannot write any. count: of tokens, 0 for
    none."""
    if count == 0:
        return []
    if reason := why_not(original):
        context.console.warn(f"generate_tokens={count}: no texts of the models: {reason}; generate_tokens=0")
        return []
    texts, layers = [], [layer.name for layer in quantized.layers]
    for stage in generation_stages(original, quantized.stage, layers, tokenizer, count):
        found = json.loads((context.run(stage).path / _FILE).read_text(encoding="utf-8"))
        if isinstance(found, str):
            context.console.warn(f"generate_tokens={count}: no texts of the models: {found}; generate_tokens=0")
            return []
        texts.append([tokenizer.decode(ids) for ids in found])
    prompts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompt_ids(tokenizer)]
    return [Generation(*one) for one in zip(prompts, *texts, strict=True)]


def generation_stages(
    original: StreamedModel, quantize: Stage, layers: list[str], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Stage]:
    """Of the original, and of the result of the stage `quantize`."""

    def reloaded(context: Context) -> StreamedModel:
        checkpoint = open_quantized(context, quantize, layers).checkpoint
        return context.open_model(checkpoint, original.trust_remote_code)

    ids = prompt_ids(tokenizer)

    def stage(name: str, inputs: tuple[str | None, ...], opened: Callable[[Context], StreamedModel]) -> Stage:
        def make(scratch: Path, context: Context) -> None:
            found: list[list[int]] | str
            try:
                found = generate(opened(context), ids, count).tolist()
            except torch.OutOfMemoryError:  # on another day there may be enough
                raise
            except FAILURES as error:
                found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            (scratch / _FILE).write_text(json.dumps(found), encoding="utf-8")

        return Stage(
            name=name,
            kind="generated",
            spec={"prompts": ids.tolist(), "count": count, "dtype": str(original.dtype)},
            inputs=inputs,
            make=make,
            cost=Workload.generate,
        )

    return [
        stage("generate original", tuple(original.identity), lambda context: original),
        stage("generate quantized", (quantize.key,), reloaded),
    ]
