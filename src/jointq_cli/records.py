"""What a run found out, as plain values: one row per layer, the measurements, the whole report.

Knows no torch, no files and no terminal. The engine fills these in, `report` renders them, and their JSON form
(`dataclasses.asdict`) is `report.json`.
"""

from dataclasses import dataclass, field
from typing import Any

IDENTICAL = "identical"  # what a reload check says that found no difference


@dataclass(frozen=True)
class LayerRecord:
    """One quantised linear layer.

    `output_error` is tr(E H E^T) / tr(W H W^T) on the calibration tokens, with E = W - W_quantised and H the Hessian
    X^T X / tokens of the layer's inputs; `weight_error` is |E|^2 / |W|^2. W_quantised is the weight as it is stored, W
    what it was made from: the original weight, or with QEP the corrected one.
    """

    name: str
    block: int
    kind: str  # the last part of the name, such as q_proj
    out_features: int
    in_features: int
    bits: int
    group_size: int  # columns per scale, in_features when per channel
    bits_per_weight: float  # codes, scales, zero-points and permutation
    output_error: float
    weight_error: float
    damping: float | None  # fraction of the Hessian's mean diagonal that was added, None where none is used
    seconds: float
    verdict: str  # "ok", "damped" (the ladder was climbed), "fallback" (RTN instead of a failed solve)
    notes: dict[str, Any] = field(default_factory=dict)  # what else the quantizer has to say: dead columns, condition


@dataclass(frozen=True)
class BlockRecord:
    """One decoder block. `output_error` is |quantised - original|^2 / |original|^2 of its output on the first batch of
    calibration windows: the error of all blocks up to it, as it has accumulated."""

    block: int
    output_error: float


@dataclass(frozen=True)
class Protocol:
    """The identity of a perplexity: two figures compare only where these agree."""

    dataset: str
    split: str
    text_hash: str  # sha256 of the evaluated token windows and of what is scored in them, first 16 digits
    window: int  # tokens
    stride: int  # tokens
    bos: str  # none | first | each
    dtype: str
    windows: int
    scored_tokens: int

    def line(self) -> str:
        return (
            f"{self.dataset}/{self.split} window={self.window} stride={self.stride} bos={self.bos} "
            f"dtype={self.dtype} windows={self.windows} tokens={self.scored_tokens} text={self.text_hash}"
        )


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood (nats per token); standard errors over windows."""

    value: float
    standard_error: float
    nll: float
    nll_standard_error: float


@dataclass(frozen=True)
class Comparison:
    """The quantised model against the original on the same tokens."""

    nll_increase: float  # nats per token
    nll_increase_standard_error: float  # paired over windows, so much smaller than either perplexity's own
    kl_divergence: float  # KL(original || quantised), nats per token
    kl_divergence_standard_error: float
    top1_agreement: float  # share of tokens where both models put the same token first


@dataclass(frozen=True)
class Audit:
    """The checkpoint's tensors against the source's: names, shapes, dtypes and bytes."""

    identical: int
    quantized: int
    missing: list[str]
    unexpected: list[str]
    changed: list[str]  # tensors that nobody selected and whose bytes differ all the same
    source_bytes: int
    checkpoint_bytes: int
    packed_bytes: int  # what the model takes with codes packed at their bit-width

    @property
    def passed(self) -> bool:
        return not (self.missing or self.unexpected or self.changed)


@dataclass(frozen=True)
class StageRecord:
    """One step of the road. `reused` stages were found in the store and cost nothing this time."""

    name: str
    seconds: float
    reused: bool
    peak_memory: int  # bytes, resident set of the process so far


@dataclass(frozen=True)
class RunReport:
    """Everything a run proves. Written to report.json as it is."""

    recipe: str
    model: str
    model_hash: str
    architecture: str
    parameters: int
    quantizer: str  # a line such as "GPTQ W4 g128 asymmetric mse act_order"
    calibration: str  # a line such as "pydoc/calibration 128 x 512 tokens concat_chunk seed 0 text=..."
    protocol: Protocol
    original: Perplexity
    quantized: Perplexity
    comparison: Comparison
    reload_check: str  # IDENTICAL, or by how much the reloaded checkpoint differs from the in-memory model
    audit: Audit
    bits_per_weight: float  # over the quantised layers
    layers: list[LayerRecord]
    blocks: list[BlockRecord]
    stages: list[StageRecord]
    peak_memory: int  # bytes
    versions: dict[str, str]
    device: str
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationReport:
    """What `jointq evaluate` measures. Written to evaluation.json as it is."""

    model: str
    model_hash: str
    reference: str | None
    protocol: Protocol
    perplexity: Perplexity
    comparison: Comparison | None  # with the reference, where one was given
    stages: list[StageRecord]
    versions: dict[str, str]
