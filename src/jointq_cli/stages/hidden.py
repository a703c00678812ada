"""A model's final hidden states on the evaluation windows: every quantised version of it is compared with them."""

from pathlib import Path

from torch import Tensor

from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.plan.costs import Workload
from jointq_cli.system.tensor_files import read_rows, save_tensors

_FILE = "hidden.safetensors"


def hidden_stage(model: StreamedModel, windows: ScoredWindows, batch: int, name: str = "evaluate original") -> Stage:
    """batch: windows per forward pass."""

    def make(scratch: Path, context: Context) -> None:
        hidden = context.team.gather_rows(own_hidden(context, model, windows.ids, batch))
        context.team.on_rank0(save_tensors, scratch / _FILE, {"hidden": hidden})

    return Stage(
        name=name,
        kind="hidden",
        spec={"batch": batch, "dtype": str(model.dtype), "device": model.device.type},
        inputs=(*model.identity, windows.hash),
        make=make,
        cost=Workload.evaluate_original,
        together=True,
    )


def own_hidden(context: Context, model: StreamedModel, ids: Tensor, batch: int) -> Tensor:
    """Final hidden states (windows, tokens, hidden) on this process's part of the windows (windows, tokens) int64."""
    with context.console.bar("evaluate", total=len(model)) as bar:
        return final_hidden(model, ids, batch, bar.advance, context.pause, context.team.part(len(ids), batch))


def read_hidden(context: Context, stage: Stage, windows: ScoredWindows, batch: int) -> Tensor:
    """The result of `hidden_stage` on this process's part of the windows."""
    return read_rows(context.directory(stage) / _FILE, "hidden", context.team.part(len(windows.ids), batch))
