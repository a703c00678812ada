"""The results of a run as plain values: a record per layer, the measurements, the complete report.

Knows no torch, no files and no terminal. The pipeline creates these records and `report` renders them. Their JSON form
(`dataclasses.asdict`) is a published format, report.json among others: a field keeps its name.
"""

from dataclasses import dataclass, field
from typing import Any

from jointq_cli.records.allocation import AllocationRecord

IDENTICAL = "identical"  # the verdict of a reload check without a difference, and of a replay that is the same run
WITHIN_TOLERANCE = "within the tolerance"
DIFFERENT = "different"
FULL_COVERAGE = 0.95  # of the weights of the decoder blocks: below, a run warns about what is left out
NO_TOKEN = "no token"  # the verdict of a layer of an expert that no calibration token is routed to
REQUESTED, COMPUTED, MEASURED = "asked", "made", "measured"  # the parts of a run that a replay compares


@dataclass(frozen=True)
class LayerRecord:
    """One quantised linear layer.

    `output_error` is tr(E H E^T) / tr(W H W^T) on the calibration tokens, with E = W - W_quantised and the Hessian
    H = X^T X / tokens of the layer's inputs X (tokens, in_features); `weight_error` is |E|^2 / |W|^2. W_quantised is
    the weight as it is stored, W the weight that was quantised: the original one, or with QEP the corrected one.
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
    damping: float | None  # fraction of the Hessian's mean diagonal that was added to its diagonal, None if unused
    seconds: float
    # "ok", "damped" (after damping retries), "fallback" (RTN: solver failed), "no input" (RTN: none or zero)
    # or "no token" (none is routed to this expert: solved for those that enter the block's experts)
    verdict: str
    notes: dict[str, Any] = field(default_factory=dict)  # what else the quantizer reports: dead columns, condition
    label: str = ""  # how the weight is stored, such as "W4 g128 asymmetric"; older reports lack it
    tokens: int | None = None  # of calibration, routed to this expert; None for layers of no expert
    block_share: float = 0.0  # of the tokens that the expert was solved for: of the block's, routed to it or not


@dataclass(frozen=True)
class BlockRecord:
    """One decoder block. `output_error` is |quantised - original|^2 / |original|^2 of its output on the first batch of
    calibration windows, with all blocks up to it quantised: the accumulated error."""

    block: int
    output_error: float


@dataclass(frozen=True)
class ValidationPoint:
    """The quantisation error on the validation tokens after `step` steps of learning a rotation."""

    step: int
    error: float


@dataclass(frozen=True)
class RotationTraining:
    """How one rotation was learned. Losses and errors are means over sites on validation tokens; an error is
    |x - q(x)|^2 / |x|^2 of the rotated activations x, with q rounding to few bits per token."""

    name: str  # R1, or R2 and its block
    steps: int  # of the optimiser
    best_step: int  # the step whose rotation was kept
    loss_before: float
    loss_after: float
    error_before: float
    error_after: float
    moved: float  # |R - R0| / |R0|
    errors: list[ValidationPoint]


@dataclass(frozen=True)
class Site:
    """The inputs of quantised layers of one block, before and after smoothing and rotation, on a few validation tokens.

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
    """How far logits are from those of the original model in float32 on a few calibration tokens:
    |difference| / |original logits|."""

    merge: float  # of the rotated model in float32: the error of merging the rotation into the weights
    stored: float  # of the rotated model in `dtype`
    rounding: float  # of the original model in `dtype`: what `stored` is to be compared with
    dtype: str  # of the run
    tokens: int


@dataclass(frozen=True)
class RotationRecord:
    """A change of basis: its settings, how it was constructed, and its effect. Written to rotation.json as it is."""

    rotation: str  # a line such as "R1+R2 random Hadamard seed=0"
    smoothing: str
    constructions: list[str]  # the Hadamard matrices that were used: "R2: Hadamard 64"
    orthogonality_error: float  # the largest |R R^T - I|
    hash: str  # sha256 of rotation.safetensors
    online: list[str]  # rotations that a model in this basis must apply at run time
    courses: list[RotationTraining]  # one per learned rotation
    sites: list[Site]
    invariance: Invariance
    source_bytes: int  # of the weights
    rotated_bytes: int


@dataclass(frozen=True)
class RefinementPoint:
    """One measurement while a refinement trains. Losses are means over windows: KL in nats per token for a model, the
    relative error of its output for a block."""

    step: int
    loss: float | None  # of the windows trained on since the measurement before; None at the start
    heldout_loss: float


@dataclass(frozen=True)
class RefinementCourse:
    """How the model, or one block, was trained."""

    name: str  # model, or block 3
    steps: int
    best_step: int  # whose result was kept
    points: list[RefinementPoint]


@dataclass(frozen=True)
class RefinementRecord:
    """What a refinement was, and what it has changed."""

    refinement: str  # a line such as "model scales+norms+codes 120 x 2 windows seed=0"
    codes_changed: float  # share
    norms: list[str]  # the tensors of gains that were trained
    courses: list[RefinementCourse]


@dataclass(frozen=True)
class Simulation:
    """What was simulated while the quantised model was evaluated, and is not stored in the checkpoint."""

    activations: str  # a line such as "A4 asymmetric per token clip=searched down_proj=A8"
    clip_ratios: dict[str, float]  # by layer


@dataclass(frozen=True)
class Protocol:
    """How a perplexity was measured: two perplexities are comparable only if their protocols are equal."""

    dataset: str
    split: str
    text_hash: str  # sha256 of the token windows and of which tokens are scored, first 16 digits
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
    nll_increase_standard_error: float  # paired over windows, so much smaller than that of either perplexity
    kl_divergence: float  # KL(original || quantised), nats per token
    kl_divergence_standard_error: float
    top1_agreement: float  # fraction of tokens for which both models rank the same token first


@dataclass(frozen=True)
class TaskScore:
    """standard_error: over the samples; None where the value is not a mean over them."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class TaskRecord:
    """One figure of a task as lm-eval measures it. Two figures are comparable only if their `task_hash` is equal."""

    task: str
    metric: str  # such as acc, or exact_match,strict-match with the name of a filter
    samples: int
    fewshot: int  # examples before each question
    task_hash: str  # sha256 of requests, samples and settings, first 16 digits
    harness: str  # "lm-eval" and its version
    score: TaskScore  # of the quantised model, or of the one evaluated
    original: TaskScore | None  # None where there is no reference
    change_standard_error: float | None  # paired over samples

    @property
    def name(self) -> str:
        return f"{self.task} {self.metric}"


@dataclass(frozen=True)
class Audit:
    """The checkpoint's tensors against the source's: names, shapes, dtypes and bytes."""

    identical: int
    quantized: int
    missing: list[str]
    unexpected: list[str]
    changed: list[str]  # tensors that were not to be quantised but whose bytes differ
    source_bytes: int  # of the original model's weights
    checkpoint_bytes: int
    packed_bytes: int  # size of the model with codes packed at their bit width
    refined: int = 0  # gains of norms that the refinement has changed, and that are as it left them

    @property
    def passed(self) -> bool:
        return not (self.missing or self.unexpected or self.changed)


@dataclass(frozen=True)
class Coverage:
    """How much of the model was quantised. Weights are its matrices; norms and biases do not count."""

    share: float  # of the weights of all decoder blocks that were quantised
    left_out: dict[str, float]  # the others by kind, such as mlp.experts.up_proj, as shares of the same total
    block_bits: float  # bits per weight over all weights of the decoder blocks
    checkpoint_bits: float  # bits per parameter over the complete checkpoint, its codes packed

    @property
    def is_complete(self) -> bool:
        return self.share >= FULL_COVERAGE


@dataclass(frozen=True)
class EngineCheck:
    """An export as its engine computes it, against the dequantised checkpoint in float32 on the same windows."""

    engine: str  # with its version
    windows: int
    kl_divergence: float  # nats per token
    perplexity_change: float  # relative
    problems: list[str]  # figures beyond their limits, text that the engine tokenizes otherwise


@dataclass(frozen=True)
class ExportRecord:
    """A packed checkpoint in the layout of a runtime, as it was read back from its files."""

    format: str  # such as "gguf-q4_0": the name of its directory
    files: dict[str, int]  # bytes by name
    weight_bytes: int  # of the files that hold weights
    bits_per_weight: float  # over the quantised layers, as the format stores them
    worst_error: float  # of a quantised weight, in steps of its grid; 0 where the format holds it exactly
    rounded: dict[str, float] = field(default_factory=dict)  # other tensors that the format rounds: relative error
    types: dict[str, int] = field(default_factory=dict)  # tensors of each type, such as "Q4_K", the most frequent first
    warnings: list[str] = field(default_factory=list)  # what the runtimes cannot do with it
    commands: dict[str, str] = field(default_factory=dict)  # by runtime, run in the directory: what serves it
    check: EngineCheck | None = None  # None where the engine is not installed


@dataclass(frozen=True)
class Generation:
    """What both models write after a prompt, the most likely token each time."""

    prompt: str
    original: str
    quantized: str


@dataclass(frozen=True)
class StageRecord:
    """One stage of the pipeline. The result of a `reused` stage came from the store."""

    name: str
    seconds: float
    reused: bool
    peak_memory: int  # bytes, resident set of the process so far


@dataclass(frozen=True)
class StageEstimate:
    """The estimated cost of one stage, without the part that the store already has."""

    name: str
    state: str  # such as "to make", "reused" or "continues at block 3 of 4"
    seconds: float
    memory: float  # bytes, the peak of the process
    disk: float  # bytes that stay


@dataclass(frozen=True)
class RunEstimate:
    """The estimated cost of a run. Sizes are in bytes."""

    stages: list[StageEstimate]
    seconds: float
    memory: float  # peak
    memory_available: float
    disk: float  # that stay
    scratch: float  # on the disk during the run only, in addition to `disk`
    disk_free: float
    warnings: list[str]
    notes: list[str]


@dataclass(frozen=True)
class RunReport:
    """The complete result of a run of `jointq quantize`. Written to report.json as it is."""

    recipe: str
    model: str
    model_hash: str
    architecture: str
    parameters: int
    quantizer: str  # a line such as "GPTQ W4 g128 asymmetric mse act_order"
    rotation: RotationRecord | None
    simulation: Simulation | None  # active while `quantized` and `comparison` were measured
    calibration: str  # a line such as "pydoc/calibration 128 x 512 tokens concat_chunk seed 0 text=..."
    protocol: Protocol
    original: Perplexity
    quantized: Perplexity
    comparison: Comparison
    reload_check: str  # IDENTICAL, or by how much the reloaded checkpoint differs from the model in memory
    audit: Audit
    bits_per_weight: float  # over the quantised layers
    layers: list[LayerRecord]
    blocks: list[BlockRecord]
    stages: list[StageRecord]
    peak_memory: int  # bytes
    versions: dict[str, str]
    device: str
    warnings: list[str] = field(default_factory=list)
    coverage: Coverage | None = None  # None in older reports
    exports: list[ExportRecord] = field(default_factory=list)
    failed_exports: list[str] = field(default_factory=list)  # why others could not be written
    generations: list[Generation] = field(default_factory=list)
    base_model: str = ""  # name of `model`, a hub id where it has one; older reports lack it
    beyond_limits: list[str] = field(default_factory=list)  # a line for each figure beyond the recipe's limits
    tasks: list[TaskRecord] = field(default_factory=list)
    refinement: RefinementRecord | None = None
    allocation: AllocationRecord | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """What `jointq evaluate` measures. Written to evaluation.json as it is."""

    model: str
    model_hash: str
    reference: str | None
    protocol: Protocol
    perplexity: Perplexity
    comparison: Comparison | None  # with the reference, if there is one
    stages: list[StageRecord]
    versions: dict[str, str]
    tasks: list[TaskRecord] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    engine: str | None = None  # that computed the model, with its version, such as "llama.cpp (xllamacpp 2026.10)"
    problems: list[str] = field(default_factory=list)  # what the engine does otherwise, such as tokenizing


@dataclass(frozen=True)
class ComparedStep:
    """One comparison of a replay with the original run."""

    name: str
    part: str  # REQUESTED, COMPUTED or MEASURED
    same: bool
    detail: str
    at: int | None = None  # position of the first differing layer or block, None for other differences


@dataclass(frozen=True)
class ReplayedMetric:
    """A measurement to which a tolerance applies."""

    name: str
    original: float
    replay: float
    change: float  # relative to the original run's


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a replay with the original run, in the order of the pipeline. Written to reproduction.json."""

    original: str  # directories
    replay: str
    verdict: str  # IDENTICAL, WITHIN_TOLERANCE or DIFFERENT
    steps: list[ComparedStep]
    surroundings: list[str]  # differences of machine, libraries and code, such as "torch 2.9.0 → 2.13.0"
    figures: list[ReplayedMetric]
    tolerance: float | None  # relative, None if the runs must be identical
    rounding: list[str] = field(default_factory=list)  # those of `surroundings` that can change rounding
    unknown: list[str] = field(default_factory=list)  # what may differ unnoticed, because it is not recorded
    problems: list[str] = field(default_factory=list)  # of the replay itself, whatever the original
    sentence: str = ""  # the verdict and its reason

    @property
    def first_difference(self) -> ComparedStep | None:
        """The first step that differs; of those about layers and blocks, the one that differs earliest in the model."""
        differing = [step for step in self.steps if not step.same]
        if not differing or differing[0].at is None:
            return differing[0] if differing else None
        return min((step for step in differing if step.at is not None), key=lambda step: step.at or 0)
