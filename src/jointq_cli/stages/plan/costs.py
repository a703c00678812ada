"""What the stages of a run cost in time, memory and disk, computed from shapes alone.

Counts matrix products and the large tensors that exist at the same time. Everything smaller is covered by factors that
were fitted to measured runs; docs/plan.md says to which, and how accurate the estimates are. Memory is what a stage
adds to the process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from jointq_cli.evaluation.perplexity import LOGITS_AT_ONCE
from jointq_cli.formats.base import StoredWeight
from jointq_cli.quantization.accumulator import packed_size
from jointq_cli.quantization.expert_settings import BLOCK_TOKENS_PER_COLUMN
from jointq_cli.quantization.gradients import LOGITS_AT_ONCE as LABELS_AT_ONCE
from jointq_cli.quantization.gradients import output_groups
from jointq_cli.recipe import Recipe
from jointq_cli.stages.plan.model_sizes import InputGroup, Shapes
from jointq_cli.stages.plan.throughput import Speeds
from jointq_cli.transforms import changes_basis

FLOAT, DOUBLE = 4, 8  # bytes
KERNELS = 200e6  # bytes of memory of the compiler and the compiled kernels
REPORTS = 3e6  # bytes of the report files
TEXT_SECONDS, TOKENS_PER_SECOND = 0.3, 200_000
READ = 1.5e9  # bytes read, hashed or written per second

# Fitted to measured runs. Pointwise operations are in units of the one that `throughput` measures.
KERNELS_SECONDS = 1.2  # to load the compiled kernels
STATISTICS_OPERATIONS = 6  # pointwise, per element of a layer's input for its statistics; twice as many with QEP
STATISTICS_SLOWDOWN = 1.4  # of the statistics' narrow matrix products relative to wide ones
HIDDEN_OPERATIONS = 14  # pointwise, per element of a block's hidden states
MLP_OPERATIONS = 3  # pointwise, per element of the hidden states inside the MLP
BLOCK_SECONDS = 0.02  # overhead per block: loading modules, writing files
TOKENS_PER_BLOCK_SECONDS = 32  # one token of the prompts through one block takes about 0.6 ms
CACHE_COPIED = 3.5e9  # bytes per second of keys and values, which each token appends to
ENGINE_WINDOWS, ENGINE_SECONDS = 8, 2.0  # through an inference engine, and what loading a model into it takes
LAYER_SECONDS = 0.008  # overhead per layer
HARNESS_SECONDS = 1.0  # of a task in lm-eval besides its forward passes
LOGIT_OPERATIONS = 30  # pointwise, per logit and model
PACKING_OPERATIONS = 40  # pointwise, per quantised weight: packed, read back and compared
WEIGHT_OPERATIONS = 40  # pointwise, per quantised weight: codes, scales, errors, files


@dataclass(frozen=True)
class Cost:
    """Of one stage. memory: peak bytes. disk: bytes that are kept. scratch: bytes on the disk while it runs."""

    seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    scratch: float = 0.0

    def remaining(self, share: float) -> "Cost":
        """Of a stage of which only this share is left; any share above 0 needs all of the memory and scratch space."""
        unfinished = share > 0
        return Cost(self.seconds * share, self.memory * unfinished, self.disk * share, self.scratch * unfinished)


@dataclass(frozen=True)
class Windows:
    """Windows of `length` tokens each."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True)
class Workload:
    """Everything that costs depend on.

    shares_hessians: whether Hessians are a stage of their own, so that `quantize` need not collect them. element: bytes
    of an element in the forward pass. dtype: that of the checkpoint.
    """

    shapes: Shapes
    recipe: Recipe
    calibration: Windows
    evaluation: Windows
    shares_hessians: bool
    element: int
    dtype: torch.dtype
    speeds: Speeds

    # the stages, in their order

    def model(self) -> Cost:
        """Reads all weights twice: for the hash, and to check that they are finite."""
        return Cost(seconds=2 * self._source_bytes / READ, memory=self.stored * self._largest_outside)

    def text(self, windows: Windows) -> Cost:
        return Cost(seconds=TEXT_SECONDS + windows.tokens / TOKENS_PER_SECOND)

    def activations(self) -> Cost:
        shapes, tokens = self.shapes, self.recipe.rotation.sampled_tokens
        kept = min(tokens, self.calibration.tokens) * (3 * shapes.hidden + shapes.widest) * self.element
        return Cost(
            seconds=self.forward(self.calibration),
            memory=max(self._outside, self.block + self._pass) + self.stream(self.calibration) + kept,
            disk=kept * shapes.blocks,
        )

    def rotate(self) -> Cost:
        shapes = self.shapes
        size = self.rotated_bytes
        outside = (FLOAT + self.stored) * 2 * shapes.embedding
        merged = 2 * shapes.hidden * (shapes.in_blocks + 2 * shapes.embedding) / self.speeds.double
        tokens = self.calibration.tokens
        learning = self.recipe.rotation.learning_cost(shapes.hidden, shapes.heads, shapes.blocks, tokens)
        learned = learning.operations / self.speeds.single
        return Cost(
            seconds=3 * merged + size / READ + 8 * BLOCK_SECONDS * shapes.blocks + learned,
            memory=max(outside + (FLOAT + DOUBLE) * shapes.largest_block, learning.elements * self.element),
            disk=size,
        )

    def _packed(self, one: InputGroup) -> float:
        """Bytes of the float64 Hessian of an input, and of the one over held-out tokens if there are any."""
        parts = 2 if self.shapes.heldout else 1
        return parts * DOUBLE * packed_size(one.in_features)

    def hessians(self) -> Cost:
        """One pass of all calibration windows through the original model."""
        in_block = 2 * self.block + self._suspended + max(map(self.group_memory, self.shapes.inputs))
        return Cost(
            seconds=self.forward(self.calibration) + sum(map(self._moments_seconds, self.shapes.inputs)),
            memory=self.stream(self.calibration) + max(self.outside_rotated, in_block),
            disk=sum(map(self._packed, self.shapes.inputs)),
            scratch=2 * self.stream(self.calibration),
        )

    def gradients(self) -> Cost:
        """A pass of all calibration windows forward, and one back through blocks that are run once more."""
        stream, shapes = self.stream(self.calibration), self.shapes
        outputs = [rows for one in shapes.inputs for rows in one.out_features]
        squares = [sum((span.stop - span.start) ** 2 for span in output_groups(rows)) for rows in outputs]
        logits = min(LABELS_AT_ONCE, shapes.vocabulary * self.calibration.length)
        in_block = self.block + 3 * self._pass + DOUBLE * sum(squares) / shapes.blocks
        products = 1.2 * STATISTICS_SLOWDOWN * self.calibration.tokens * sum(squares) / self.speeds.single
        return Cost(
            seconds=3 * self.forward(self.calibration) + self.logits(self.calibration.tokens, models=2) + products,
            memory=2 * stream + max(self.outside_rotated + 3 * DOUBLE * logits, in_block),
            disk=FLOAT * (sum(squares) / 2 + self.calibration.tokens * len(outputs)),
            scratch=(shapes.blocks + 1) * stream,
        )

    def quantize(self) -> Cost:
        streams = self._streams * self.stream(self.calibration)
        if self.shares_hessians:
            streams = 2 * self.first_stream
        in_block = 2 * self.block + self._suspended + max(map(self.group_memory, self.shapes.inputs))
        return Cost(
            seconds=KERNELS_SECONDS + self._collecting() + sum(map(self.solving_seconds, self.shapes.inputs)),
            memory=KERNELS + streams + max(self.outside_rotated, in_block),
            disk=self.quantized_bytes + self.codes,
            scratch=2 * streams,
        )

    def evaluate_original(self) -> Cost:
        hidden = self.stream(self.evaluation)
        return Cost(
            seconds=self.forward(self.evaluation),
            memory=hidden + max(self._outside, self.block + self._pass),
            disk=hidden,
        )

    def evaluate_quantized(self) -> Cost:
        hidden = self.stream(self.evaluation)
        simulated = 1.0 + 1.2 * self.recipe.activations.simulates
        logits = min(LOGITS_AT_ONCE, self.shapes.vocabulary * self.evaluation.length)
        return Cost(
            seconds=simulated * self.forward(self.evaluation) + self._scoring() + self.first_batch(),
            memory=2 * hidden + max(self._outside + self.outside_rotated + 6 * FLOAT * logits, self.block + self._pass),
        )

    def export(self) -> Cost:
        """Packs the codes shard by shard, and reads them back."""
        packed = self.quantized_bytes - self.stored * self.shapes.selected + self._sum_of_forms(_packed_bytes)
        shard = max(self.stored * (self.shapes.outside + self._untied), self.stored * self.shapes.largest_block)
        widest = 3 * DOUBLE * self.shapes.widest * max(max(one.out_features) for one in self.shapes.inputs)
        return Cost(
            seconds=(2 * packed + 2 * self.codes) / READ
            + PACKING_OPERATIONS * self.shapes.selected / self.speeds.pointwise,
            memory=2 * shard + widest,
            disk=packed,
        )

    def task(self, requests: int, mean: int, longest: int, batch: int) -> Cost:
        """All requests of a task through the complete model in plain transformers. mean, longest: tokens of a request.
        batch: requests per forward pass."""
        windows = Windows(requests, mean)
        complete = self.loaded(self.shapes.in_blocks + self.shapes.outside + self._untied)
        return Cost(
            seconds=HARNESS_SECONDS
            + self._source_bytes / READ
            + self.forward(windows)
            + self.logits(windows.tokens, models=1),
            memory=complete + batch * longest * self.shapes.vocabulary * (self.element + 2 * FLOAT) + self._pass,
        )

    def engine_check(self) -> Cost:
        """A few windows through the dequantised checkpoint, and through the export, complete in an engine's memory."""
        few = Windows(min(ENGINE_WINDOWS, self.evaluation.count), self.evaluation.length)
        return Cost(
            seconds=ENGINE_SECONDS + 2 * self.forward(few),
            memory=FLOAT * self.shapes.embedding + self.stored * (self.shapes.in_blocks + self.shapes.outside),
        )

    def generate(self) -> Cost:
        """All weights in memory at once, read for each token of one model."""
        size = self.outside_rotated + self.loaded(self.shapes.in_blocks)
        seconds = BLOCK_SECONDS * self.shapes.blocks * (1 + self.recipe.generate_tokens / TOKENS_PER_BLOCK_SECONDS)
        return Cost(seconds=seconds + (1 + self.recipe.generate_tokens) * size / READ, memory=size)

    def write(self, windows: Windows, at_once: int, memory: float) -> Cost:
        """The complete model writes windows, so many side by side: all weights are read for each of their tokens.
        memory: bytes of weights, keys and values."""
        steps = -(-windows.count // at_once) * windows.length
        size = self.outside_rotated + self.loaded(self.shapes.in_blocks)
        reading = steps * (size / READ + BLOCK_SECONDS * self.shapes.blocks / TOKENS_PER_BLOCK_SECONDS)
        copying = steps * max(0.0, memory - size) / (2 * CACHE_COPIED)  # on average half of them are there
        seconds = reading + copying + self.forward(windows) + self.logits(windows.tokens, models=1)
        return Cost(seconds=seconds, memory=memory, disk=8 * windows.tokens)

    def file_hashes(self) -> Cost:
        return Cost(seconds=(self.quantized_bytes + self.codes) / READ)

    def audit(self) -> Cost:
        """Reads both checkpoints and dequantises every layer."""
        return Cost(
            seconds=2 * self._source_bytes / READ + 20 * self.shapes.selected / self.speeds.pointwise,
            memory=FLOAT * 3 * self.shapes.widest * max(max(one.out_features) for one in self.shapes.inputs),
        )

    def run_directory(self, *, linked: bool) -> Cost:
        """linked: files are hard links into the store and take no space."""
        return Cost(disk=REPORTS + (not linked) * (self.quantized_bytes + self.codes))

    @property
    def rotated_bytes(self) -> float:
        """The size of the rotated checkpoint."""
        return self._source_bytes + self.stored * self._untied

    # parts of several stages

    @property
    def stored(self) -> int:
        """Bytes of an element in the checkpoint."""
        return self.dtype.itemsize

    @property
    def _untied(self) -> int:
        """Elements that R1 adds by untying the embeddings."""
        return self.shapes.embedding if self.shapes.is_tied and "R1" in self.recipe.rotation.parts else 0

    @property
    def _source_bytes(self) -> float:
        return self.stored * (self.shapes.in_blocks + self.shapes.outside)

    @property
    def quantized_bytes(self) -> float:
        rotates = changes_basis(self.recipe.rotation, self.recipe.smoothing)
        return self.rotated_bytes if rotates else self._source_bytes

    @property
    def codes(self) -> float:
        """Bytes of the layers' files."""
        return self._sum_of_forms(lambda form: form.file_bytes)

    def _sum_of_forms(self, size: Callable[[StoredWeight], float]) -> float:
        """Of the stored weights of all selected layers."""
        sizes: dict[tuple[int, int, str], float] = {}
        total = 0.0
        for one in self.shapes.inputs:
            for rows, quantizer in zip(one.out_features, one.quantizers, strict=True):
                key = (rows, one.in_features, repr(quantizer))
                if key not in sizes:
                    sizes[key] = size(quantizer.storage(rows, one.in_features, self.dtype))
                total += sizes[key]
        return total

    @property
    def _largest_outside(self) -> int:
        return max(self.shapes.embedding, self.shapes.largest_block)

    @property
    def _outside(self) -> float:
        """Bytes of embeddings and head."""
        return self.loaded(self.shapes.outside)

    @property
    def outside_rotated(self) -> float:
        """The same for the model to quantise, which may be rotated."""
        return self.loaded(self.shapes.outside + self._untied)

    @property
    def block(self) -> float:
        return self.loaded(self.shapes.largest_block)

    def loaded(self, parameters: int) -> float:
        """Bytes in the dtype of the forward pass, plus those as read if the checkpoint has another dtype."""
        return parameters * (self.element if self.element == self.stored else self.element + self.stored)

    def stream(self, windows: Windows) -> float:
        """Bytes of the hidden states."""
        return windows.tokens * self.shapes.hidden * self.element

    @property
    def _streams(self) -> int:
        """How many streams of hidden states (original, quantised) run through every block over all windows."""
        return 2 if self.recipe.qep.describe() else 1

    @property
    def _batch(self) -> int:
        """Tokens of one forward pass of calibration."""
        length = self.calibration.length
        return min(max(length, self.recipe.runtime.batch_tokens // length * length), self.calibration.tokens)

    @property
    def _pass(self) -> float:
        """Bytes of the activations of one forward pass."""
        return self._batch * (6 * self.shapes.hidden + 4 * self.shapes.widest) * self.element

    @property
    def _suspended(self) -> float:
        """Bytes in suspended forward passes: queries, keys, values and residual stream, or the widest layer's input."""
        per_token = max(4 * self.shapes.hidden, 2 * self.shapes.hidden + self.shapes.widest) * self.element
        return min(
            self.recipe.runtime.suspended_activations_gb * 1e9, self._streams * self.calibration.tokens * per_token
        )

    def group_memory(self, one: InputGroup) -> float:
        """Bytes while an input's statistics are collected (moments, and one pass with float32 copies), or while its
        layers are solved (moments, their factors, and float64 copies of a layer), whichever are more."""
        square, rows = one.in_features**2 * DOUBLE, max(one.out_features) * one.in_features * DOUBLE
        qep = bool(self.recipe.qep.describe())
        parts = 2 if self.shapes.heldout or self.recipe.qep.heldout else 1
        moments = collected = parts * (square + qep * (square + one.writes * rows))
        if one.experts:
            experts, matrices = self.recipe.experts, parts * (1 + qep)
            at_once = min(one.experts, experts.at_once(one.in_features, matrices))
            moments, collected = at_once * moments, at_once * experts.bytes_each(one.in_features, matrices)
        collecting = collected + self._pass + self._batch * 4 * FLOAT * one.in_features
        return max(collecting, moments + (2 + 2 * qep) * square + 3 * rows)

    def forward(self, windows: Windows) -> float:
        """Seconds of all blocks over all windows."""
        shapes, tokens = self.shapes, windows.tokens
        attention = 4 * windows.length * shapes.hidden * shapes.blocks  # per token: Q K^T, and its product with V
        products = tokens * (2 * (shapes.in_blocks - shapes.idle) + attention) / self.speeds.forward
        pointwise = HIDDEN_OPERATIONS * shapes.hidden + MLP_OPERATIONS * shapes.widest + self._attention_scores(windows)
        elements = tokens * shapes.blocks * pointwise
        return products + elements / self.speeds.pointwise + shapes.blocks * BLOCK_SECONDS

    def _attention_scores(self, windows: Windows) -> float:
        """Elements per token of the softmax in one attention layer; the causal mask removes half of them."""
        return self.shapes.heads * windows.length / 2

    def first_batch(self) -> float:
        """Seconds of one batch of calibration windows through all blocks, as in the reload check."""
        return self.forward(Windows(max(1, self._batch // self.calibration.length), self.calibration.length))

    def _scoring(self) -> float:
        """Seconds of both models' logits and their comparison."""
        return self.logits(self.evaluation.tokens, models=2)

    def logits(self, tokens: int, models: int) -> float:
        logits = tokens * self.shapes.vocabulary
        products = 2 * logits * self.shapes.hidden / self.speeds.forward
        return models * products + LOGIT_OPERATIONS * logits / self.speeds.pointwise

    @property
    def first_stream(self) -> float:
        return self._batch * self.shapes.hidden * self.element

    def _collecting(self) -> float:
        """Seconds in which `quantize` runs the calibration windows and collects statistics."""
        if self.shares_hessians:
            return 2 * self.first_batch()
        moments = sum(map(self._moments_seconds, self.shapes.inputs))
        return self._streams * self.forward(self.calibration) + moments

    def _moments_seconds(self, one: InputGroup) -> float:
        """Seconds of collecting an input's statistics."""
        tokens, width, rows = self._tokens_of(one), one.in_features, sum(one.out_features)
        qep = bool(self.recipe.qep.describe())
        residual = 2 * tokens * width * rows if qep and one.writes else 0
        moments = tokens * width**2 * (1.2 + 2 * qep) + residual
        pointwise = STATISTICS_OPERATIONS * (1 + qep) * tokens * width
        running = (
            2 * tokens * width * rows * (1 + qep) if one.experts else 0.0
        )  # experts are run once more for each stage
        seconds = STATISTICS_SLOWDOWN * moments / self.speeds.single + pointwise / self.speeds.pointwise
        return seconds + running / self.speeds.forward

    def _tokens_of(self, one: InputGroup) -> float:
        """How many tokens the statistics of an input are of."""
        own, everything, experts = one.share * self.calibration.tokens, self.calibration.tokens, self.recipe.experts
        if not one.experts or experts.calibration == "all":
            return everything
        if one.reads_tokens or not experts.tokens_of_block(round(own), one.in_features):
            return own
        return own + min(everything, max(self._batch, BLOCK_TOKENS_PER_COLUMN * one.in_features))

    def solving_seconds(self, one: InputGroup) -> float:
        """Seconds of solving the layers that read an input."""
        width, rows = one.in_features, sum(one.out_features)
        qep = bool(self.recipe.qep.describe())
        prepared = len({quantizer.prepare_key for quantizer in one.quantizers})
        solves = self.recipe.curvature.solves
        double = prepared * width**3 * (1 + qep) + (qep * 6 + 4 * (solves - 1)) * rows * width**2
        weights = rows * width
        seconds = double / self.speeds.double
        seconds += 8 * weights * width / self.speeds.single  # the errors that are reported of a layer
        seconds += WEIGHT_OPERATIONS * weights / self.speeds.pointwise + LAYER_SECONDS * len(one.out_features)
        layers = zip(one.quantizers, one.out_features, strict=True)
        operations = sum(quantizer.cost(out, width, self.calibration.tokens) for quantizer, out in layers)
        return seconds + solves * operations / self.speeds.single


def _packed_bytes(form: StoredWeight) -> float:
    return form.stored_bits / 8


def total(costs: Sequence[Cost]) -> Cost:
    """Of stages that run one after another: time and disk add up, of memory and scratch space the largest counts."""
    return Cost(
        seconds=sum(cost.seconds for cost in costs),
        memory=max((cost.memory for cost in costs), default=0.0),
        disk=sum(cost.disk for cost in costs),
        scratch=max((cost.scratch for cost in costs), default=0.0),
    )
