"""AutoRound (auto-round): rounding and ranges of a block trained by signed gradients of the block's output."""

import frozen
import torch
from auto_round import AutoRound
from transformers import AutoTokenizer


def main() -> None:
    parser = frozen.parser(__doc__)
    parser.add_argument("--iterations", type=int, default=200, help="steps of each block")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a step")
    parser.add_argument("--extension", action="store_true", help="enable_alg_ext, its experimental initialisation")
    given = parser.parse_args()
    windows = frozen.windows(given.tokens)
    model = frozen.load(given.model)
    tuned, _ = AutoRound(
        model,
        AutoTokenizer.from_pretrained(given.model),
        scheme={"bits": given.bits, "group_size": given.group_size, "sym": False, "data_type": "int"},
        dataset=[{"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]} for window in windows],
        iters=given.iterations,
        batch_size=given.batch_size,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        **({"enable_alg_ext": True} if given.extension else {}),
    ).quantize()
    # Its format=fake may write the weights of a float32 source back as they were, hence the model in memory.
    frozen.save(given.model, dict(tuned.named_parameters()), given.output)


if __name__ == "__main__":
    main()
