"""Quantizers, corrections and windows shared by tests of the quantising loop."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tiny_models import GROUPED
from torch import Tensor
from transformers import AutoModelForCausalLM

from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.assembly import assemble
from jointq_cli.quantization.expert_settings import DEFAULT_EXPERTS, ExpertSettings
from jointq_cli.quantization.loop import quantize_blocks
from jointq_cli.quantization.qep import NoQep, Qep, QepSettings
from jointq_cli.quantization.quantizers import GPTQ, RTN, JointQ, Quantizer
from jointq_cli.quantization.quantizers.jointq import GptqStart
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.records import LayerRecord

CPU = torch.device("cpu")
ROUND = RTN(bits=4, group_size=32, symmetric=False, mse=False)
SOLVE = GPTQ(
    bits=3, group_size=32, symmetric=False, mse=True, act_order=True, static_groups=False, damping=0.01, block_size=32,
    on_failure="error",
)  # fmt: skip

JOINT = JointQ(
    bits=3, group_size=32, regularization_lambda=0.01, lambda_list=[0.0, 0.1, 1.0], max_sweeps=2,
    annealing_temperature=0.2, ils_num_iterations=1, ils_num_clones=1, gptq=GptqStart(block_size=32),
)  # fmt: skip

NO_QEP = NoQep()
QEP = Qep(
    perccorr=0.5, residual=0.0, perccorr_mode="fixed", heldout_share=0.25, percdamp=0.01, pull="original",
    exclude_layer_keywords=["mlp.down_proj"],
)  # fmt: skip
FULL = replace(QEP, perccorr=1.0, residual=0.5, exclude_layer_keywords=[])
WEIGHED = TokenWeights("residual", power=2.0, first_token=0.5)
EQUAL = TokenWeights("uniform", power=2.0, first_token=1.0)


def windows(count: int = 6) -> Tensor:
    return torch.randint(3, 256, (count, 16), generator=torch.Generator().manual_seed(2))


def quantize(
    directory: Path,
    scratch: Path,
    quantizer: Quantizer = ROUND,
    inputs: str = "quantized",
    keep: Callable[[str], bool] = lambda name: True,
    pause: Callable[[], None] = lambda: None,
    tokens: Tensor | None = None,
    batch: int = 4,
    qep: QepSettings = NO_QEP,
    weights: TokenWeights = EQUAL,
    suspended: float = 1e9,
    own: Mapping[str, Quantizer] | None = None,
    experts: ExpertSettings = DEFAULT_EXPERTS,
    precision: str | None = None,
) -> tuple[StreamedModel, Workspace, list[LayerRecord]]:
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    names = frozenset(n for n in model.linear_layers() if model.block_of(n) is not None and keep(n))
    scratch.mkdir(exist_ok=True)
    workspace, records = Workspace(scratch), []
    with torch.no_grad():
        tokens = windows() if tokens is None else tokens
        settings = LoopSettings(
            quantizer,
            qep,
            names,
            inputs,
            weights,
            len(tokens),
            batch,
            suspended,
            own or {},
            experts,
            precision=precision,
        )
        quantize_blocks(model, tokens, settings, workspace, records.append, pause)
        assemble(model, workspace, scratch / "checkpoint", code=False)
    return model, workspace, records


def file_hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.suffix != ".json"}


def granite(directory: Path) -> Path:
    """A model that adds a quarter of its layers' outputs to the residual stream."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(transformers.GraniteConfig(**GROUPED, residual_multiplier=0.25))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn_like(parameter) * parameter.shape[1] ** -0.5
    model.save_pretrained(directory)
    return directory
