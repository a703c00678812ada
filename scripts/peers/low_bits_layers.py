"""OneComp's quantizers of one and two bits on single layers, called as its Runner calls them.

    python scripts/peers/low_bits_layers.py FOLDER METHOD...

FOLDER has layers as *.safetensors: weight (out, in) and hessian X^T X / tokens (in, in). Of each by each method this
writes FOLDER/onecomp/METHOD/LAYER.safetensors with the dequantised weight, and its CPU seconds in the metadata. What is
there is not computed again. Runs on one thread.
"""

import sys
import time
from pathlib import Path

import torch
from one_comp import stub_lm_eval
from safetensors.torch import load_file, save_file
from torch import nn

stub_lm_eval()

from onecomp.quantizer.arb import ARB  # noqa: E402
from onecomp.quantizer.cq import CQ  # noqa: E402
from onecomp.quantizer.dbf import DBF  # noqa: E402
from onecomp.quantizer.onebit import Onebit  # noqa: E402
from onecomp.quantizer.qbb import QBB  # noqa: E402
from onecomp.quantizer.quip import QUIP  # noqa: E402

METHODS = {
    "cq": CQ,
    "arb": ARB,
    "onebit": Onebit,
    "onebit-unbalanced": lambda: Onebit(use_balancing=False),
    "dbf-1.0": lambda: DBF(target_bits=1.0),
    "dbf-1.5": lambda: DBF(target_bits=1.5),
    "dbf-2.0": lambda: DBF(target_bits=2.0),
    "dbf-1.0-unbalanced": lambda: DBF(target_bits=1.0, use_balancing=False),
    "qbb-1": lambda: QBB(wbits=1),
    "qbb-2": lambda: QBB(wbits=2),
    "quip-2": lambda: QUIP(wbits=2),
}


def solve(method: str, weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The dequantised weight, and CPU seconds."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    quantizer = METHODS[method]()
    quantizer.validate_params()
    started = time.process_time()
    result = quantizer.quantize_layer(linear, None, hessian=2.0 * hessian.float())  # its Runner has the factor 2
    seconds = time.process_time() - started
    return torch.as_tensor(result.compute_dequantized_weight()).float().contiguous(), seconds


def main() -> None:
    folder, methods = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    for method in methods:
        (folder / "onecomp" / method).mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.safetensors")):
            target = folder / "onecomp" / method / path.name
            if target.exists():
                continue
            layer = load_file(path)
            torch.manual_seed(0)
            weight, seconds = solve(method, layer["weight"], layer["hessian"])
            save_file({"weight": weight}, target, {"cpu_seconds": f"{seconds:.3f}"})
            print(f"{method} {path.stem}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
