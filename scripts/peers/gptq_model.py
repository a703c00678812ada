"""GPTQModel: GPTQ in activation order with its search for the range (mse 2.4); the file it saves, dequantised."""

import os
import tempfile

import frozen
import torch
from safetensors.torch import save_file

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader refuses the one that it takes on two cores
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

GROUPS = "group_index.safetensors"  # see bench_peers.py: neighbours do not share a scale after a permutation


def main() -> None:
    given = frozen.parser(__doc__).parse_args()
    config = QuantizeConfig(
        bits=given.bits, group_size=given.group_size, sym=False, desc_act=True, act_group_aware=False, mse=2.4
    )
    windows = frozen.windows(given.tokens).tolist()
    with tempfile.TemporaryDirectory() as packed:
        model = GPTQModel.load(str(given.model), config, device="cpu")
        model.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows], batch_size=1)
        model.save(packed)
        del model
        stored = GPTQModel.load(packed, device="cpu", backend=BACKEND.TORCH).model
    weights, groups = {}, {}
    for name, module in stored.named_modules():
        if hasattr(module, "dequantize_weight"):
            weights[f"{name}.weight"] = module.dequantize_weight().T.contiguous().float()
            groups[f"{name}.weight"] = module.g_idx.to(torch.int32)
    frozen.save(given.model, weights, given.output)
    save_file(groups, given.output / GROUPS)


if __name__ == "__main__":
    main()
