"""Models as the engines that serve them compute them: transformers, llama.cpp, MLX and vLLM, where installed.

Each loads the complete model, and scores one window at a time.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointq_cli.errors import ModelError, ResourceError
from jointq_cli.evaluation.engine_model import EngineModel
from jointq_cli.evaluation.llama_cpp import LlamaCppModel
from jointq_cli.evaluation.perplexity import Predictions
from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class InferenceEngine:
    """How an engine is installed and opened."""

    name: str
    module: str  # importable where it is installed
    package: str  # on PyPI
    extra: str  # of this project that installs it; "" where none is needed
    open: Callable[[Path], EngineModel]

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        package = packages_distributions().get(self.module, [self.package])[0]  # builds for CPUs have other names
        return f"{package} {version(package)}"


class EnginePredictions(Predictions):
    """Those of an engine on these windows."""

    def __init__(self, model: EngineModel, windows: ScoredWindows) -> None:
        self.model = model
        self.windows = windows
        self._window: tuple[int, Tensor] | None = None

    @property
    def vocabulary(self) -> int:
        return self.model.vocabulary

    def log_probabilities(self, window: int, positions: Tensor) -> Tensor:
        if self._window is None or self._window[0] != window:
            with _naming(f"the engine, at window {window},", "compute"):
                self._window = window, self.model.log_probabilities(self.windows.ids[window])
        return self._window[1][positions]


@contextmanager
def _naming(subject: str, action: str) -> Iterator[None]:
    """Raises ModelError for whatever an engine raises."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{subject} cannot {action}: {type(error).__name__}: {reason}") from error


def require_installed(name: str) -> None:
    """Raises ResourceError, which says how it is installed, for an engine that is not."""
    engine = ENGINES[name]
    if not engine.is_installed:
        way = f"pip install 'jointq[{engine.extra}]'" if engine.extra else f"pip install {engine.package}"
        raise ResourceError(f"engine={name}: {engine.module} is not installed; {way}")


@contextmanager
def opened(name: str, path: Path) -> Iterator[EngineModel]:
    """A model in the engine of this name. path: a directory, or of llama.cpp a GGUF file.

    Raises as `require_installed`, and ModelError where the engine cannot load the model.
    """
    require_installed(name)
    with _naming(f"{path}: {name}", "load this model"):
        model = ENGINES[name].open(path)
    try:
        yield model
    finally:
        model.close()


class TransformersModel(EngineModel):
    """transformers, which decodes packed weights by the library of their format."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoConfig, GPTQConfig
        from transformers.utils import logging

        from jointq_cli.models.skeleton import auto_class

        logging.disable_progress_bar()
        packed = Checkpoint(directory, packed=True).config.get("quantization_config") or {}
        if packed.get("transform_config"):
            raise ModelError("transformers does not turn inputs by a transform_config; without engine=, or engine=vllm")
        further: dict[str, Any] = {}
        if packed.get("quant_method") == "gptq" and not torch.cuda.is_available():
            # Its other kernels for CPUs compile C++ for minutes at the first forward pass.
            further["quantization_config"] = GPTQConfig(bits=packed["bits"], backend="gptq_torch")
        auto = auto_class(AutoConfig.from_pretrained(directory))
        self.model = auto.from_pretrained(directory, dtype="auto", **further).eval()
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])

    def log_probabilities(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids[None].to(self.model.device)).logits[0]
        return torch.log_softmax(logits.float(), dim=-1).cpu()


class MlxModel(EngineModel):
    """mlx-lm, on Apple's GPUs, and on the CPU of others."""

    def __init__(self, directory: Path) -> None:
        import mlx.core as mx
        from mlx.utils import tree_map
        from mlx_lm.utils import load_model

        self.model, config = load_model(directory)
        if mx.default_device() == mx.cpu:  # which takes forty times as long for float16; float32 holds it exactly
            self.model.update(tree_map(_in_float32, self.model.parameters()))
        self.vocabulary = int(config["vocab_size"])

    def log_probabilities(self, ids: Tensor) -> Tensor:
        import mlx.core as mx
        import numpy as np

        logits = self.model(mx.array(ids.numpy())[None])[0].astype(mx.float32)
        return torch.log_softmax(torch.from_numpy(np.array(logits)), dim=-1)


def _in_float32(array: Any) -> Any:
    import mlx.core as mx

    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


class VllmModel(EngineModel):
    """vLLM, of whose predictions only those of the text's own tokens are read: it gives log-likelihoods, no KL."""

    def __init__(self, directory: Path) -> None:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

        self.model = LLM(str(directory), enforce_eager=True, max_num_seqs=1, enable_prefix_caching=False)
        self.sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
        self.vocabulary = int(self.model.model_config.get_vocab_size())

    def log_probabilities(self, ids: Tensor) -> Tensor:
        prompt = {"prompt_token_ids": ids.tolist()}
        found = self.model.generate(prompt, self.sampling, use_tqdm=False)[0].prompt_logprobs
        values = torch.full((len(ids), self.vocabulary), math.nan)
        for position, (token, entry) in enumerate(zip(ids.tolist()[1:], found[1:], strict=True)):
            values[position, token] = entry[token].logprob
        return values


ENGINES = {
    engine.name: engine
    for engine in (
        InferenceEngine("transformers", "transformers", "transformers", "", TransformersModel),
        InferenceEngine("llama.cpp", "xllamacpp", "xllamacpp", "llamacpp", LlamaCppModel),
        InferenceEngine("mlx", "mlx_lm", "mlx-lm", "mlx", MlxModel),
        InferenceEngine("vllm", "vllm", "vllm", "vllm", VllmModel),
    )
}
