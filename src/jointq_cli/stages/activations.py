"""A sample of the original model's activations: all rotations of a sweep learn from the same one."""

from pathlib import Path

from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ConfigError
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.plan.costs import Workload
from jointq_cli.transforms.activation_samples import ActivationSamples, collect_samples
from jointq_cli.transforms.architectures import ArchitectureLayout

LEAST_TOKENS = 64  # of which an eighth is only measured with


def activations_stage(
    model: StreamedModel, layout: ArchitectureLayout, tokens: Tokens, sampled: int, batch: int
) -> Stage:
    """A sample of `sampled` tokens per site; batch: windows per forward pass. Raises ConfigError for too few tokens."""
    if tokens.windows.numel() < LEAST_TOKENS:
        raise ConfigError(
            f"calibration.num_samples={len(tokens.windows)}: must make at least {LEAST_TOKENS} tokens for a rotation, "
            f"not {tokens.windows.numel()}"
        )

    def make(scratch: Path, context: Context) -> None:
        with context.console.bar("activations", total=len(model)) as bar:
            samples = ActivationSamples(scratch, len(model))
            collect_samples(model, layout, tokens.windows, batch, sampled, samples, bar.advance, context.pause)

    return Stage(
        name="activations",
        kind="activations",
        spec={"tokens": sampled, "batch": batch, "dtype": str(model.dtype), "device": model.device.type},
        inputs=(*model.identity, tokens.hash),
        make=make,
        cost=Workload.activations,
    )
