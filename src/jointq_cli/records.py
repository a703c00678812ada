"""What a run found out, as plain values: one row per layer, the measurements, the whole report.

Knows no torch, no files and no terminal. The engine fills these in, `report` renders them, and their JSON form
(`dataclasses.asdict`) is `report.json`.
"""

from dataclasses import dataclass, field
from typing import Any

IDENTICAL = "identical"  # what a reload check says that found no difference, and a replay that is the same run
WITHIN_TOLERANCE = "within the tolerance"
DIFFERENT = "different"
ASKED, MADE, MEASURED = "asked", "made", "measured"  # what a step of a replay is about


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
    bits: int | None  # of a code, None where codes are not of equal width
    group_size: int | None  # columns per scale, in_features when per channel; None where there are no groups
    bits_per_weight: float  # everything that is stored
    output_error: float
    weight_error: float
    damping: float | None  # fraction of the Hessian's mean diagonal that was added, None where none is used
    seconds: float
    verdict: str  # "ok", "damped" (damping had to be raised), "fallback" (RTN instead of a failed solve)
    notes: dict[str, Any] = field(default_factory=dict)  # what else the quantizer has to say: dead columns, condition
    label: str = ""  # how it is stored, such as "W4 g128 asymmetric"; older reports lack it


@dataclass(frozen=True)
class BlockRecord:
    """One decoder block. `output_error` is |quantised - original|^2 / |original|^2 of its output on the first batch of
    calibration windows: the error of all blocks up to it, as it has accumulated."""

    block: int
    output_error: float


@dataclass(frozen=True)
class ValidationPoint:
    """The error on the grid after so many steps of learning a rotation."""

    step: int
    error: float


@dataclass(frozen=True)
class RotationTraining:
    """How one rotation was learned. Losses and errors are means over sites of tokens that were not learned from; an
    error is |x - q(x)|^2 / |x|^2 of the rotated activations on a grid of few bits per token."""

    name: str  # R1, or R2 and its block
    steps: int  # that the optimiser took
    best_step: int  # whose rotation was kept
    loss_before: float
    loss_after: float
    error_before: float
    error_after: float
    moved: float  # |R - R0| / |R0|
    errors: list[ValidationPoint]


@dataclass(frozen=True)
class Site:
    """What quantised layers of one block are given, before and after smoothing and rotation, on a few tokens that
    nothing was learned from.

    sqnr: 10 log10 of |x|^2 / |x - q(x)|^2 at 4 bits per token (asymmetric, clip .9), dB. peak: mean over tokens of
    max|x| / rms. kurtosis: mean over tokens, 3 for a Gaussian.
    """

    block: int
    name: str  # attention | mlp | o_proj | down_proj
    sqnr_before: float
    sqnr_after: float
    peak_before: float
    peak_after: float
    kurtosis_before: float
    kurtosis_after: float


@dataclass(frozen=True)
class Invariance:
    """The rotated model's logits against the original's on a few calibration tokens, |difference| / |original|, all
    relative to the original in float32: of the merge itself, of the rotated model as stored, and of the original as
    stored, whose rounding is the measure for it. The latter two run in the run's own dtype."""

    merge: float
    stored: float
    rounding: float
    dtype: str
    tokens: int


@dataclass(frozen=True)
class RotationRecord:
    """A change of basis: what was asked, how it was found, and what it does. Written to rotation.json as it is."""

    rotation: str  # a line such as "R1+R2 random Hadamard seed=0"
    smoothing: str
    constructions: list[str]  # the Hadamard matrices that were used, and for what
    orthogonality_error: float  # the largest |R R^T - I|
    hash: str  # sha256 of rotation.safetensors
    online: list[str]  # rotations that a checkpoint in this basis needs while it runs
    courses: list[RotationTraining]
    sites: list[Site]
    invariance: Invariance
    source_bytes: int  # of the weights
    rotated_bytes: int


@dataclass(frozen=True)
class Simulation:
    """What was not stored but simulated while the quantised model was evaluated."""

    activations: str  # a line such as "A4 asymmetric per token clip=searched down_proj=A8"
    clip_ratios: dict[str, float]  # by layer


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
    source_bytes: int  # of the original model's weights
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
class StageEstimate:
    """One step of a road that is not taken yet. Of what is left of it: seconds, the process's peak of memory, and bytes
    that will stay on the disk."""

    name: str
    state: str  # "to make", "reused", "continues at block 3 of 4" and the like
    seconds: float
    memory: float
    disk: float


@dataclass(frozen=True)
class RunEstimate:
    """What a run would take, and what there is, in seconds and bytes. scratch: on the disk while it runs, beside what
    stays."""

    stages: list[StageEstimate]
    seconds: float
    memory: float
    memory_there: float
    disk: float
    scratch: float
    disk_there: float
    warnings: list[str]
    notes: list[str]


@dataclass(frozen=True)
class RunReport:
    """Everything a run proves. Written to report.json as it is."""

    recipe: str
    model: str
    model_hash: str
    architecture: str
    parameters: int
    quantizer: str  # a line such as "GPTQ W4 g128 asymmetric mse act_order"
    rotation: RotationRecord | None
    simulation: Simulation | None  # while `quantized` and `comparison` were measured
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


@dataclass(frozen=True)
class ComparedStep:
    """One comparison of a replay with the original run."""

    name: str
    part: str  # ASKED, MADE or MEASURED
    same: bool
    detail: str
    at: int | None = None  # where in the order of the model the difference begins, None where it is not about a part


@dataclass(frozen=True)
class ReplayedFigure:
    """A measurement that a tolerance is for."""

    name: str
    original: float
    replay: float
    change: float  # relative to the original run's


@dataclass(frozen=True)
class Reproduction:
    """How a replay compares with the original run, in the order of the road. Written to reproduction.json as it is."""

    original: str  # directories
    replay: str
    verdict: str  # IDENTICAL, WITHIN_TOLERANCE or DIFFERENT
    steps: list[ComparedStep]
    surroundings: list[str]  # in which machine, libraries and code differ, such as "torch 2.9.0 → 2.13.0"
    figures: list[ReplayedFigure]
    tolerance: float | None  # relative, None where only identical runs will do
    rounding: list[str] = field(default_factory=list)  # those of the surroundings that can round otherwise
    unknown: list[str] = field(default_factory=list)  # what may differ and would not be seen
    problems: list[str] = field(default_factory=list)  # that the replay itself has, whatever the original

    @property
    def first_difference(self) -> ComparedStep | None:
        """Layers and blocks take turns: of steps about them, the one that begins earliest in the model."""
        differing = [step for step in self.steps if not step.same]
        if not differing or differing[0].at is None:
            return differing[0] if differing else None
        return min((step for step in differing if step.at is not None), key=lambda step: step.at or 0)
