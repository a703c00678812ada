"""What the stages of a run cost in time, memory and disk, from shapes alone.

Counts the large tensors that are alive together, and the products; the small rest is in factors that were fitted to
measured runs (docs/plan.md says which, and how near the estimates come). Memory is what a stage adds to the process.
Knows neither stores nor terminals.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jointq_cli.evaluation.perplexity import LOGITS_AT_ONCE
from jointq_cli.quantization.accumulator import packed_size
from jointq_cli.recipe import Recipe
from jointq_cli.stages.plan.model_sizes import InputGroup, Shapes
from jointq_cli.stages.plan.throughput import Speeds
from jointq_cli.transforms import changes_basis

FLOAT, DOUBLE = 4, 8  # bytes
KERNELS = 200e6  # bytes of the compiler and of what it compiles
REPORTS = 3e6
TEXT_SECONDS, TOKENS_PER_SECOND = 0.3, 200_000
READ = 1.5e9  # bytes per second that are read, hashed or written

# Fitted.
KERNELS_SECONDS = 1.2  # to load them
CASTS = 6  # pointwise operations on what a layer is given, for its statistics; with QEP twice as many
PANELS = 1.4  # what the statistics' narrow products take, against wide ones
POINTWISE = 14  # pointwise operations on the hidden states per block and token, and
WIDE = 3  # on the hidden states of the MLP
BLOCK_SECONDS = 0.02  # of a block by itself: modules that are exchanged, files
LAYER_SECONDS = 0.008
SCORED = 30  # pointwise operations per logit and model, in units of the measured one
CODED = 40  # for each weight: codes, scales, errors, files


@dataclass(frozen=True)
class Cost:
    """Of one stage. disk: bytes that stay. scratch: bytes on the disk that do not."""

    seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    scratch: float = 0.0

    def left(self, share: float) -> "Cost":
        """Of a stage of which only a share is still to be done; memory is needed for the least of it."""
        some = share > 0
        return Cost(self.seconds * share, self.memory * some, self.disk * share, self.scratch * some)


@dataclass(frozen=True)
class Windows:
    """How many, and of how many tokens."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True)
class Workload:
    """Everything that costs depend on. element: bytes of one in the forward pass. dtype: that of the checkpoint."""

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
        """Two readings: one for the hash, one for what is not finite."""
        return Cost(seconds=2 * self._source_bytes / READ, memory=self.stored * self._largest_outside)

    def text(self, windows: Windows) -> Cost:
        return Cost(seconds=TEXT_SECONDS + windows.tokens / TOKENS_PER_SECOND)

    def activations(self) -> Cost:
        shapes, tokens = self.shapes, self.recipe.rotation.sampled_tokens
        kept = min(tokens, self.calibration.tokens) * (3 * shapes.hidden + shapes.widest) * self.element
        return Cost(
            seconds=self._forward(self.calibration),
            memory=max(self._outside, self._block + self._pass) + self._stream(self.calibration) + kept,
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
        """Bytes of a Hessian in float64, and of that of held-out tokens as well."""
        parts = 2 if self.recipe.quantizer.heldout else 1
        return parts * DOUBLE * packed_size(one.in_features)

    def hessians(self) -> Cost:
        """One walk through the original model."""
        in_block = 2 * self._block + self._waiting + max(map(self._group_memory, self.shapes.inputs))
        return Cost(
            seconds=self._forward(self.calibration) + sum(map(self._moments_seconds, self.shapes.inputs)),
            memory=self._stream(self.calibration) + max(self._outside_rotated, in_block),
            disk=sum(map(self._packed, self.shapes.inputs)),
            scratch=2 * self._stream(self.calibration),
        )

    def quantize(self) -> Cost:
        streams = self._streams * self._stream(self.calibration)
        if self.shares_hessians:
            streams = 2 * self._first_stream
        in_block = 2 * self._block + self._waiting + max(map(self._group_memory, self.shapes.inputs))
        return Cost(
            seconds=KERNELS_SECONDS + self._collecting() + sum(map(self._solving_seconds, self.shapes.inputs)),
            memory=KERNELS + streams + max(self._outside_rotated, in_block),
            disk=self._quantized_bytes + self._codes,
            scratch=2 * streams,
        )

    def evaluate_original(self) -> Cost:
        hidden = self._stream(self.evaluation)
        return Cost(
            seconds=self._forward(self.evaluation),
            memory=hidden + max(self._outside, self._block + self._pass),
            disk=hidden,
        )

    def evaluate_quantized(self) -> Cost:
        hidden = self._stream(self.evaluation)
        simulated = 1.0 + 1.2 * self.recipe.activations.simulates
        logits = min(LOGITS_AT_ONCE, self.shapes.vocabulary * self.evaluation.length)
        return Cost(
            seconds=simulated * self._forward(self.evaluation) + self._scoring() + self._first_batch(),
            memory=2 * hidden
            + max(self._outside + self._outside_rotated + 6 * FLOAT * logits, self._block + self._pass),
        )

    def file_hashes(self) -> Cost:
        return Cost(seconds=(self._quantized_bytes + self._codes) / READ)

    def audit(self) -> Cost:
        """Both checkpoints are read, and every weight is made of its codes."""
        return Cost(
            seconds=2 * self._source_bytes / READ + 20 * self.shapes.selected / self.speeds.pointwise,
            memory=FLOAT * 3 * self.shapes.widest * max(max(one.out_features) for one in self.shapes.inputs),
        )

    def run_directory(self, *, linked: bool) -> Cost:
        """linked: what is in the store costs nothing again."""
        return Cost(disk=REPORTS + (not linked) * (self._quantized_bytes + self._codes))

    @property
    def rotated_bytes(self) -> float:
        """Of a rotated checkpoint."""
        return self._source_bytes + self.stored * self._untied

    # what they have in common

    @property
    def stored(self) -> int:
        """Bytes of an element in the checkpoint."""
        return self.dtype.itemsize

    @property
    def _untied(self) -> int:
        """Elements that R1 adds: what was tied is no longer."""
        return self.shapes.embedding if self.shapes.is_tied and "R1" in self.recipe.rotation.parts else 0

    @property
    def _source_bytes(self) -> float:
        return self.stored * (self.shapes.in_blocks + self.shapes.outside)

    @property
    def _quantized_bytes(self) -> float:
        rotates = changes_basis(self.recipe.rotation, self.recipe.smoothing)
        return self.rotated_bytes if rotates else self._source_bytes

    @property
    def _codes(self) -> float:
        """Bytes of the layers' files."""
        sizes = Counter((rows, one.in_features) for one in self.shapes.inputs for rows in one.out_features)
        storage = self.recipe.quantizer.storage
        return sum(count * storage(*size, self.dtype).file_bytes for size, count in sizes.items())

    @property
    def _largest_outside(self) -> int:
        return max(self.shapes.embedding, self.shapes.largest_block)

    @property
    def _outside(self) -> float:
        """Embeddings and head in the dtype of the forward pass, and as read if that is another one."""
        return self._held(self.shapes.outside)

    @property
    def _outside_rotated(self) -> float:
        """The same of the model that is quantised."""
        return self._held(self.shapes.outside + self._untied)

    @property
    def _block(self) -> float:
        return self._held(self.shapes.largest_block)

    def _held(self, parameters: int) -> float:
        return parameters * (self.element if self.element == self.stored else self.element + self.stored)

    def _stream(self, windows: Windows) -> float:
        return windows.tokens * self.shapes.hidden * self.element

    @property
    def _streams(self) -> int:
        """How many streams run through every block in full."""
        return 2 if self.recipe.qep.describe() else 1

    @property
    def _batch(self) -> int:
        """Tokens of one forward pass of calibration."""
        length = self.calibration.length
        return min(max(length, self.recipe.runtime.batch_tokens // length * length), self.calibration.tokens)

    @property
    def _pass(self) -> float:
        """What one forward pass holds."""
        return self._batch * (6 * self.shapes.hidden + 4 * self.shapes.widest) * self.element

    @property
    def _waiting(self) -> float:
        """Of passes that wait: queries, keys, values and the stream, or what the widest layer is given."""
        per_token = max(4 * self.shapes.hidden, 2 * self.shapes.hidden + self.shapes.widest) * self.element
        return min(
            self.recipe.runtime.suspended_activations_gb * 1e9, self._streams * self.calibration.tokens * per_token
        )

    def _group_memory(self, one: InputGroup) -> float:
        """While an input is collected: its moments, and one pass with its float32 copies. While it is solved: the same
        moments, factors and what they are made of, and a layer's rows."""
        square, rows = one.in_features**2 * DOUBLE, max(one.out_features) * one.in_features * DOUBLE
        qep = bool(self.recipe.qep.describe())
        parts = 2 if self.recipe.quantizer.heldout or self.recipe.qep.heldout else 1
        moments = parts * (square + qep * (square + one.writes * rows))
        return moments + max(self._pass + self._batch * 4 * FLOAT * one.in_features, (2 + 2 * qep) * square + 3 * rows)

    def _forward(self, windows: Windows) -> float:
        """Seconds of all blocks over all windows."""
        shapes, tokens = self.shapes, windows.tokens
        attention = 4 * windows.length * shapes.hidden * shapes.blocks  # per token: scores, and values by them
        products = tokens * (2 * shapes.in_blocks + attention) / self.speeds.forward
        elements = tokens * shapes.blocks * (POINTWISE * shapes.hidden + WIDE * shapes.widest + self._scores(windows))
        return products + elements / self.speeds.pointwise + shapes.blocks * BLOCK_SECONDS

    def _scores(self, windows: Windows) -> float:
        """Elements per token of an attention's softmax, half of which the mask takes."""
        return self.shapes.heads * windows.length / 2

    def _first_batch(self) -> float:
        """The walk over one batch of calibration windows, of which the reload check consists."""
        return self._forward(Windows(max(1, self._batch // self.calibration.length), self.calibration.length))

    def _scoring(self) -> float:
        logits = self.evaluation.tokens * self.shapes.vocabulary
        return 2 * (2 * logits * self.shapes.hidden / self.speeds.forward + SCORED * logits / self.speeds.pointwise / 2)

    @property
    def _first_stream(self) -> float:
        return self._batch * self.shapes.hidden * self.element

    def _collecting(self) -> float:
        """Seconds of what quantising needs to know of the tokens."""
        if self.shares_hessians:
            return 2 * self._first_batch()
        moments = sum(map(self._moments_seconds, self.shapes.inputs))
        return self._streams * self._forward(self.calibration) + moments

    def _moments_seconds(self, one: InputGroup) -> float:
        """Statistics of an input."""
        tokens, width, rows = self.calibration.tokens, one.in_features, sum(one.out_features)
        qep = bool(self.recipe.qep.describe())
        drift = 2 * tokens * width * rows if qep and one.writes else 0
        moments = tokens * width**2 * (1.2 + 2 * qep) + drift
        return PANELS * moments / self.speeds.single + CASTS * (1 + qep) * tokens * width / self.speeds.pointwise

    def _solving_seconds(self, one: InputGroup) -> float:
        """The solutions of the layers that read an input."""
        width, rows = one.in_features, sum(one.out_features)
        qep = bool(self.recipe.qep.describe())
        double = width**3 * (1 + qep) + qep * 6 * rows * width**2
        weights = rows * width
        seconds = double / self.speeds.double
        seconds += 8 * weights * width / self.speeds.single  # the errors that are told of a layer
        seconds += CODED * weights / self.speeds.pointwise + LAYER_SECONDS * len(one.out_features)
        return seconds + self.recipe.quantizer.cost(rows, width, self.calibration.tokens) / self.speeds.single


def total(costs: Sequence[Cost]) -> Cost:
    """Of stages one after the other: time and disk add up, memory and scratch space do not."""
    return Cost(
        seconds=sum(cost.seconds for cost in costs),
        memory=max((cost.memory for cost in costs), default=0.0),
        disk=sum(cost.disk for cost in costs),
        scratch=max((cost.scratch for cost in costs), default=0.0),
    )
