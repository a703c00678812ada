"""llm-compressor: GPTQ with static activation order, or AWQ with duo scaling, both with its defaults otherwise."""

from unittest import mock

import frozen
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoTokenizer


def main() -> None:
    parser = frozen.parser(__doc__)
    parser.add_argument("--method", choices=["gptq", "awq"], required=True)
    given = parser.parse_args()
    windows = frozen.windows(given.tokens)
    weights = QuantizationArgs(num_bits=given.bits, symmetric=False, strategy="group", group_size=given.group_size)
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe = {
        "gptq": [GPTQModifier(config_groups=scheme, ignore=["lm_head"])],
        "awq": [AWQModifier(duo_scaling="both"), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])],
    }[given.method]
    model = frozen.load(given.model)
    dataset = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    with mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor):  # which AWQ calls without a GPU too
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(given.model),
            dataset=dataset,
            recipe=recipe,
            max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
        )
    for module in model.modules():  # AWQ leaves scaled weights that are not rounded yet
        if hasattr(module, "weight_scale"):
            arguments = module.quantization_scheme.weights
            module.weight.data = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, arguments)
    frozen.save(given.model, dict(model.named_parameters()), given.output)  # AWQ scales norms too


if __name__ == "__main__":
    main()
