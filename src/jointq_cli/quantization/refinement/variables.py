"""What a refinement changes: scales and codes of quantised layers, and gains of norms.

The forward pass always has the weights as they will be stored: codes are rounded to integers, scales and gains to their
dtypes. Gradients pass through the rounding as if it were not there (the straight-through estimator of Bengio et al.,
arXiv 1308.3432).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from jointq_cli.formats.turned import TurnedWeight, turned
from jointq_cli.formats.uniform import Grid, UniformWeight
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.quantization.refinement.settings import CODES, NORMS, SCALES, GradientRefinement

BETAS = (0.9, 0.95)
SMALLEST_GAIN = 1e-3  # gains below it move as if they were as large
LEAST_FACTOR = 0.1  # of a scale


class Variable:
    """Values that Adam moves (Kingma, Ba, "Adam", ICLR 2015), all float32: the values, Adam's moments of the gradient,
    and the gradient that is being summed."""

    def __init__(self, start: Tensor, rate: float, least: float = -torch.inf, most: float = torch.inf) -> None:
        self.values = start
        self.mean, self.square = torch.zeros_like(start), torch.zeros_like(start)
        self.gradient = torch.zeros_like(start)
        self._rate, self._least, self._most = rate, least, most

    def step(self, number: int, decay: float) -> None:
        """Step `number`, counted from 1, with `decay` of the learning rate; the gradient is 0 afterwards."""
        first, second = BETAS
        self.mean.lerp_(self.gradient, 1 - first)
        self.square.lerp_(self.gradient.square_(), 1 - second)
        size = self.square.div(1 - second**number).sqrt_().add_(torch.finfo(torch.float32).tiny)
        self.values.addcdiv_(self.mean, size, value=-decay * self._rate / (1 - first**number))
        self.values.clamp_(self._least, self._most)
        self.gradient.zero_()

    def begin_at(self, values: Tensor) -> None:
        """As if it had started from these."""
        self.values.copy_(values)
        for moment in (self.mean, self.square):
            moment.zero_()

    def state(self) -> dict[str, Tensor]:
        return {"values": self.values, "mean": self.mean, "square": self.square}


RefinableWeight = UniformWeight | TurnedWeight


def on_grid(stored: RefinableWeight) -> UniformWeight:
    """The codes and scales of a stored weight."""
    return stored.inner if isinstance(stored, TurnedWeight) else stored


class RefinedLayer:
    """A quantised layer: codes and scales. Of the gradient of its weight, which autograd gives, only what they need is
    kept."""

    def __init__(
        self, layer: LayerRef, form: RefinableWeight, dtype: torch.dtype, settings: GradientRefinement
    ) -> None:
        """dtype: of the weight in the checkpoint."""
        stored = on_grid(form)
        self.name, self.start = layer.name, form
        self.layer, self.dtype = layer, dtype
        self._groups = stored.column_groups()
        self._sorted = None if stored.permutation is None else stored.permutation.long()
        self._scale = stored.scale.float()
        self.variables: dict[str, Variable] = {}
        if SCALES in settings.train:
            ones = torch.ones_like(self._scale)
            self.variables[SCALES] = Variable(ones, settings.scale_lr, least=LEAST_FACTOR)
        if CODES in settings.train:
            grid = Grid(stored.bits, stored.symmetric)
            self.variables[CODES] = Variable(stored.codes.float(), settings.code_lr, grid.lowest, grid.highest)

    def listen(self) -> None:
        """Lets the layer, whose block is loaded, take the gradients of its weight."""
        weight = self.layer.module.get_parameter("weight").requires_grad_()
        weight.register_post_accumulate_grad_hook(self._take)

    def stored(self) -> RefinableWeight:
        """As it is stored now."""
        scale, codes = on_grid(self.start).scale, on_grid(self.start).codes
        if SCALES in self.variables:
            scale = (self._scale * self.variables[SCALES].values).to(scale.dtype)
        if CODES in self.variables:
            codes = self.variables[CODES].values.round().to(codes.dtype)
        return self._with(codes, scale)

    def _with(self, codes: Tensor, scale: Tensor) -> RefinableWeight:
        refined = replace(on_grid(self.start), codes=codes, scale=scale)
        return replace(self.start, inner=refined) if isinstance(self.start, TurnedWeight) else refined

    def load(self, stored: RefinableWeight) -> None:
        """Gives the module this weight."""
        weight = self.layer.module.get_parameter("weight")
        weight.data.copy_(self.layer.turned(stored.dequantize(self.dtype)))

    def of_snapshot(self, tensors: Mapping[str, Tensor]) -> RefinableWeight:
        """What `stored` was when this snapshot was taken."""
        return self._with(tensors[f"{self.name} {CODES}"], tensors[f"{self.name} {SCALES}"])

    def begin_at(self, tensors: Mapping[str, Tensor]) -> None:
        """Trains on from a snapshot."""
        stored = on_grid(self.of_snapshot(tensors))
        if SCALES in self.variables:
            self.variables[SCALES].begin_at(stored.scale.float() / self._scale)
        if CODES in self.variables:
            self.variables[CODES].begin_at(stored.codes.float())

    def snapshot(self) -> dict[str, Tensor]:
        stored = on_grid(self.stored())
        return {f"{self.name} {CODES}": stored.codes, f"{self.name} {SCALES}": stored.scale}

    def _take(self, weight: Tensor) -> None:
        assert weight.grad is not None  # autograd calls this when it has accumulated it
        gradient, weight.grad = self.layer.turned(weight.grad).float(), None
        if isinstance(self.start, TurnedWeight):  # W = V Q^T, so that the gradient of V is that of W times Q
            gradient = turned(gradient, self.start.signs).float()
        stored = on_grid(self.stored())
        if SCALES in self.variables:
            steps = stored.codes.float().sub_(stored.zero_points()[:, self._groups]).mul_(gradient)
            ordered = steps if self._sorted is None else steps[:, self._sorted]
            summed = ordered.unflatten(1, (-1, stored.group_size)).sum(dim=2)
            self.variables[SCALES].gradient.addcmul_(summed, self._scale)
        if CODES in self.variables:
            self.variables[CODES].gradient.addcmul_(gradient, stored.scale.float()[:, self._groups])


class RefinedNorm:
    """The gain of a norm: a vector of the model that is stored as a tensor of its own."""

    def __init__(self, name: str, module: nn.Module, gain: Tensor, settings: GradientRefinement) -> None:
        """name: of the parameter in the model. gain: as in the checkpoint, where the module has it in the dtype of the
        forward pass."""
        self.name = name
        self._module, self._dtype = module, gain.dtype
        self._gain = gain.float().clone()
        self._size = self._gain.abs().clamp_min(SMALLEST_GAIN)
        self.variables = {NORMS: Variable(torch.zeros_like(self._gain), settings.norm_lr)}

    def listen(self) -> None:
        """Lets the norm, which is loaded, take the gradients of its gain."""
        self._module.get_parameter("weight").requires_grad_().register_post_accumulate_grad_hook(self._take)

    def stored(self) -> Tensor:
        """As it is stored now."""
        return torch.addcmul(self._gain, self._size, self.variables[NORMS].values).to(self._dtype)

    def load(self, stored: Tensor) -> None:
        self._module.get_parameter("weight").data.copy_(stored)

    def of_snapshot(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What `stored` was when this snapshot was taken."""
        return tensors[f"{self.name} {NORMS}"]

    def begin_at(self, tensors: Mapping[str, Tensor]) -> None:
        """Trains on from a snapshot."""
        self.variables[NORMS].begin_at((self.of_snapshot(tensors).float() - self._gain) / self._size)

    def snapshot(self) -> dict[str, Tensor]:
        return {f"{self.name} {NORMS}": self.stored()}

    def _take(self, weight: Tensor) -> None:
        assert weight.grad is not None  # autograd calls this when it has accumulated it
        gradient, weight.grad = weight.grad.float(), None
        self.variables[NORMS].gradient.addcmul_(gradient, self._size)


class Refined:
    """The layers and norms of a loaded model, or of a loaded block, that are trained together."""

    def __init__(self, layers: Sequence[RefinedLayer], norms: Sequence[RefinedNorm]) -> None:
        self.layers, self.norms = layers, norms
        self._parts: list[RefinedLayer | RefinedNorm] = [*layers, *norms]
        for part in self._parts:
            part.listen()

    def step(self, number: int, decay: float) -> None:
        """One step of Adam, and the new weights in the modules."""
        for variable in self.variables.values():
            variable.step(number, decay)
        self.load(self.snapshot())

    def snapshot(self) -> dict[str, Tensor]:
        """What would be stored now, by names of its own."""
        return {name: tensor for part in self._parts for name, tensor in part.snapshot().items()}

    def load(self, snapshot: Mapping[str, Tensor]) -> None:
        """Gives the modules the weights of a snapshot; the variables stay as they are."""
        for layer in self.layers:
            layer.load(layer.of_snapshot(snapshot))
        for norm in self.norms:
            norm.load(norm.of_snapshot(snapshot))

    def begin_at(self, snapshot: Mapping[str, Tensor]) -> None:
        """Trains on from a snapshot, without what the steps before have left in Adam's moments."""
        for part in self._parts:
            part.begin_at(snapshot)
        self.load(snapshot)

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on, by names that no snapshot has."""
        return {
            f"{name} {part}": tensor
            for name, variable in self.variables.items()
            for part, tensor in variable.state().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continues with what `state` has returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.load(self.snapshot())

    @property
    def variables(self) -> dict[str, Variable]:
        """All that is trained, by names of its own."""
        return {f"{part.name} {key}": variable for part in self._parts for key, variable in part.variables.items()}
