"""Weights on a uniform grid with a scale for each column as well: W = V diag(c), of which V has codes and scales.

(Signs with a scale per row and per column: OneBit, Xu et al., arXiv 2402.11295, and ARB-RC of ARB-LLM, arXiv
2410.03129.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.uniform import UniformWeight


@dataclass(frozen=True, eq=False)
class ColumnScaledWeight(StoredWeight):
    """See the module. column_scale (in,) in the dtype of the inner scales."""

    kind: ClassVar[str] = "column_scaled"

    inner: UniformWeight
    column_scale: Tensor

    @classmethod
    def joined(cls, parts: Sequence["ColumnScaledWeight"]) -> "ColumnScaledWeight":
        """Parts of one layer, which have its column scales in common."""
        return replace(parts[0], inner=UniformWeight.joined([part.inner for part in parts]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def label(self) -> str:
        return f"{self.inner.label} column-scaled"

    @property
    def stored_bits(self) -> int:
        """Those of the inner weight, and a scale for each column."""
        return self.inner.stored_bits + 8 * self.column_scale.nbytes

    def record_fields(self) -> dict[str, Any]:
        return self.inner.record_fields() | {"label": self.label, "bits_per_weight": self.bits_per_weight}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.inner.dequantize(torch.float32).mul_(self.column_scale.float()).to(dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        return {**self.inner.to_tensors(), "column_scale": self.column_scale.contiguous()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ColumnScaledWeight":
        if "column_scale" not in tensors:
            raise ModelError("tensor column_scale is missing")
        return cls(UniformWeight.from_tensors(tensors), tensors["column_scale"])
