"""Verification of an export: its files, decoded, against the stored weights and the dequantised checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.export.base import Exporter, QuantizedModel, relative_error
from jointq_cli.formats.turned import TurnedWeight
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.records import ExportRecord

TURNED_STEPS = 1e-3  # by which a product with a Hadamard matrix in float32 may differ from one in float64
WEIGHTS = (".safetensors", ".gguf")  # endings of the files that hold them


def verified(model: QuantizedModel, exporter: Exporter, directory: Path) -> ExportRecord:
    """Reads every tensor back, one in memory at a time.

    Quantised weights are compared with what they dequantise to in float32, all others with the checkpoint's. Raises
    ModelError where one differs by more than the format's tolerance.
    """
    read = exporter.reader(model, directory)
    worst = 0.0
    for name in model.forms:
        error = _error_in_steps(read(name), model.load(name))
        worst = max(worst, error)
        allowed = TURNED_STEPS if isinstance(model.forms[name], TurnedWeight) else exporter.tolerance
        if not error <= allowed:
            raise ModelError(
                f"{directory}: {name} is read back with an error of {error:.3g} steps, and {exporter.format} allows "
                f"{allowed:g}"
            )
    rounding = {}
    for name in model.plain:
        error = relative_error(read(name), model.checkpoint.read([name])[name])
        if not error <= exporter.plain_tolerance(model, name):
            raise ModelError(f"{directory}: {name} is read back with a relative error of {error:.3g}")
        if error:
            rounding[name] = error
    sizes = [form.shape[0] * form.shape[1] for form in model.forms.values()]
    files = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    return ExportRecord(
        format=exporter.label,
        files=files,
        weight_bytes=sum(size for name, size in files.items() if name.endswith(WEIGHTS)),
        bits_per_weight=exporter.stored_bits(model) / sum(sizes),
        worst_error=worst,
        rounded=rounding,
        types=exporter.types(model, directory),
        commands=dict(exporter.commands(model, ".")),
    )


def _error_in_steps(found: Tensor, stored: StoredWeight) -> float:
    """The largest difference from the stored weight, in steps of its grid; of a K-quant, which is in a GGUF file what
    it is here, inf for any."""
    expected = stored.dequantize(torch.float32)
    if torch.equal(found, expected):
        return 0.0
    if found.shape == expected.shape and isinstance(stored, TurnedWeight):
        step = stored.inner.scale.to(torch.float32).amin(1, keepdim=True)  # each value is made of all codes of its row
    elif found.shape == expected.shape and isinstance(stored, UniformWeight):
        step = stored.scale.to(torch.float32)[:, stored.column_groups()]
    else:
        return torch.inf
    return float(((found - expected) / step).abs().max())
