"""Inputs that are turned at run time, as compressed-tensors' `transform_config` says it and vLLM computes it.

A scheme NAME turns the inputs x of the layers that it targets into x M / sqrt(size), in blocks of size = `head_dim`
columns. M (size, size) is stored once, as MODULE.NAME_input.weight of one of them: vLLM lets all layers of a scheme
share what it loads for any (CompressedTensorsLinearTransformMethod, SharedWeightParameter). Of a weight that is stored
as W Q with Q = diag(signs) H / sqrt(size), M is diag(signs) H.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.kernels.hadamard import construction, hadamard, orthogonal_hadamard
from jointq_cli.models.checkpoint import Checkpoint

INPUT = "input"  # the place of a transform, and in the name of its tensor
TYPE = "random-hadamard"  # any matrix that is stored; of "hadamard" vLLM takes its own, without signs


@dataclass
class WrittenTransforms:
    """The schemes of an export, one for each vector of signs, as its layers are written."""

    modules: dict[bytes, list[str]] = field(default_factory=dict)  # by their signs
    sizes: list[int] = field(default_factory=list)

    def add(self, module: str, signs: Tensor) -> dict[str, Tensor]:
        """The tensor to store with this layer: the matrix, if it is the first with these signs. signs (size,) int8."""
        key = signs.numpy().tobytes()
        if key in self.modules:
            self.modules[key].append(module)
            return {}
        self.modules[key] = [module]
        self.sizes.append(len(signs))
        return {_entry(module, _scheme(len(self.sizes) - 1)): matrix(signs)}

    def config(self) -> dict[str, Any]:
        """`transform_config`."""
        groups = zip(self.sizes, self.modules.values(), strict=True)
        return {
            "config_groups": {
                _scheme(index): {
                    "type": TYPE,
                    "head_dim": size,
                    "apply": [{"targets": modules, "location": INPUT}],
                }
                for index, (size, modules) in enumerate(groups)
            }
        }


def _scheme(index: int) -> str:
    return f"turned_{index}"


def matrix(signs: Tensor) -> Tensor:
    """diag(signs) H (size, size): 1 and -1 in bfloat16, or in float32 where H is of blocks."""
    size = len(signs)
    if construction(size).blocks == 1:
        return (hadamard(size) * signs[:, None]).to(torch.bfloat16)
    return (orthogonal_hadamard(size) * math.sqrt(size) * signs[:, None]).to(torch.float32)


def bits_of_matrix(size: int) -> int:
    """What `matrix` takes."""
    return (16 if construction(size).blocks == 1 else 32) * size**2


@dataclass(frozen=True)
class StoredTransforms:
    """Those of a checkpoint. config: its `quantization_config`."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]

    @cached_property
    def matrices(self) -> dict[str, str]:
        """The tensor of each scheme. Raises ModelError where one is missing, or a scheme turns something else."""
        return {name: self._matrix(name, scheme) for name, scheme in self._schemes.items()}

    def turned_back(self, module: str, weight: Tensor) -> Tensor:
        """The weight (out, in) of a layer as it is stored, in float32, in the layer's own basis. Raises ModelError as
        `matrices` does, and where the sizes do not fit."""
        scheme = next((name for name, scheme in self._schemes.items() if _turns(scheme, module)), None)
        if scheme is None:
            return weight
        stored = self.matrices[scheme]
        found = self.checkpoint.read([stored])[stored].to(torch.float32)
        size = len(found)
        if found.shape != (size, size) or weight.shape[1] % size:
            raise self._error(f"{stored} is {list(found.shape)} for {weight.shape[1]} columns of {module}")
        return torch.matmul(weight.unflatten(-1, (-1, size)), found.T).flatten(-2) / math.sqrt(size)

    @property
    def _schemes(self) -> dict[str, dict[str, Any]]:
        return dict((self.config.get("transform_config") or {}).get("config_groups") or {})

    def _matrix(self, name: str, scheme: Mapping[str, Any]) -> str:
        if scheme.get("type") != TYPE:
            raise self._error(f"type={scheme.get('type')} of its transform_config; {TYPE} is")
        others = [each for each in scheme["apply"] if each["location"] not in (INPUT, "weight_input")]
        if others or any(each.get("inverse") for each in scheme["apply"] if each["location"] == INPUT):
            raise self._error("its transform_config has more than inputs that are multiplied by a matrix")
        stored = next((tensor for tensor in self.checkpoint.tensors if tensor.endswith(_entry("", name))), None)
        if stored is None:
            raise self._error(f"no tensor {_entry('LAYER', name)} is in it")
        return stored

    def _error(self, reason: str) -> ModelError:
        return ModelError(f"{self.checkpoint.directory}: is quantised, and is not read: {reason}")


def is_meant(target: str, module: str) -> bool:
    """Whether a target of compressed-tensors, a class, a name or a pattern, means a linear layer."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in ("Linear", module)


def _turns(scheme: Mapping[str, Any], module: str) -> bool:
    return any(
        any(is_meant(target, module) for target in each["targets"])
        and not any(is_meant(target, module) for target in each.get("ignore") or ())
        for each in scheme["apply"]
        if each["location"] == INPUT
    )


def _entry(module: str, scheme: str) -> str:
    return f"{module}.{scheme}_{INPUT}.weight"
