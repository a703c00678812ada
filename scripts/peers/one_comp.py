"""OneComp (onecomp): its GPTQ with quantisation error propagation, or its JointQ, as its Runner runs them.

Replaced are the calibration set, by the frozen tokens, and lm_eval, which OneComp imports but does not need here, by an
empty module. The model computes in float32.
"""

import importlib.machinery
import sys
import types

import frozen
import torch

ALL_LAYERS = 1_000_000  # whose statistics JointQ's chunked calibration collects in one pass


def stub_lm_eval() -> None:
    for name in ("lm_eval", "lm_eval.evaluator", "lm_eval.models", "lm_eval.models.huggingface"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(sys.modules["lm_eval"])["evaluator"] = sys.modules["lm_eval.evaluator"]
    vars(sys.modules["lm_eval.models.huggingface"])["HFLM"] = object


stub_lm_eval()

from onecomp import CalibrationConfig, ModelConfig, Runner  # noqa: E402
from onecomp.quantizer.gptq import GPTQ  # noqa: E402
from onecomp.quantizer.jointq import JointQ  # noqa: E402


def replace_calibration(windows: torch.Tensor) -> None:
    """In every module of OneComp that has imported the function which prepares it."""
    inputs = {"input_ids": windows, "attention_mask": torch.ones_like(windows)}
    for name, module in list(sys.modules.items()):
        if name.startswith("onecomp") and hasattr(module, "prepare_calibration_dataset"):
            module.prepare_calibration_dataset = lambda *_, **__: dict(inputs)


def main() -> None:
    parser = frozen.parser(__doc__)
    parser.add_argument("--method", choices=["gptq-qep", "jointq"], required=True)
    parser.add_argument("--mse", action="store_true", help="GPTQ's search for the range, which OneComp leaves off")
    parser.add_argument("--regularization", type=float, default=0.1, help="λ of JointQ")
    given = parser.parse_args()
    model = ModelConfig(path=str(given.model), dtype="float32", device="cpu")
    if given.method == "jointq":
        quantizer = JointQ(bits=given.bits, group_size=given.group_size, regularization_lambda=given.regularization)
        calibration = CalibrationConfig(batch_size=4, num_layers_per_group=ALL_LAYERS)
        runner = Runner(model_config=model, quantizer=quantizer, calibration_config=calibration)
    else:
        quantizer = GPTQ(
            wbits=given.bits, groupsize=given.group_size, sym=False, mse=given.mse, bitpack_on_quantize=False
        )
        runner = Runner(model_config=model, quantizer=quantizer, qep=True, calibration_config=CalibrationConfig())
    replace_calibration(frozen.windows(given.tokens))
    runner.run()
    weights = {f"{name}.weight": result.compute_dequantized_weight() for name, result in quantizer.results.items()}
    frozen.save(given.model, weights, given.output)


if __name__ == "__main__":
    main()
