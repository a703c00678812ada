"""The config group `runtime`: device, precision, threads and memory limits."""

from dataclasses import dataclass

import torch

from jointq_cli.errors import ResourceError
from jointq_cli.setting_rules import check_settings, setting
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.machine import cpu_count

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The group `runtime` of a recipe.

    `dtype` is that of the model's own forward pass; statistics, solvers and log-likelihoods have dtypes of their own.
    `batch_tokens` bounds the tokens of one forward pass and so the activations in memory, `suspended_activations_gb`
    those of suspended forward passes (see `resumable_forward`), `hessians_gb` the Hessians on the disk.
    """

    device: str = setting("auto", pattern=r"auto|cpu|cuda(:\d+)?", form="be auto, cpu, cuda or cuda:N", decides=False)
    dtype: str = setting("auto", choices=("auto", *DTYPES))
    num_threads: int | None = setting(None, least=1, null="for all cores", decides=False)
    batch_tokens: int = setting(4096, least=1)
    suspended_activations_gb: float = setting(4.0, least=0, infinite=True, decides=False)
    hessians_gb: float = setting(16.0, least=0, infinite=True, decides=False)

    def __post_init__(self) -> None:
        check_settings(self, "runtime")

    def torch_device(self, team: Team = SINGLE_PROCESS) -> torch.device:
        """The device of this process: with several processes each has its own CUDA device, or all use the CPU. Raises
        ResourceError where there are too few CUDA devices, or CUDA is requested and absent."""
        device = self._device(team)
        if team.size > 1:
            _check_distinct(device, team)
        return device

    def _device(self, team: Team) -> torch.device:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device == "cpu" or (self.device == "auto" and not count):
            return torch.device("cpu")
        device = torch.device("cuda" if self.device == "auto" else self.device)
        if team.local_size > 1:
            device = torch.device("cuda", team.local_rank if count > 1 else 0)  # srun may show each only its own
        if (device.index or 0) >= count or 1 < count < team.local_size:
            wanted = f" for {team.local_size} processes" if team.local_size > 1 else ""
            raise ResourceError(
                f"runtime.device={self.device}: this machine offers {count} CUDA devices to PyTorch "
                f"{torch.__version__}{wanted}; use runtime.device=cpu{'' if wanted else ' or auto'}"
            )
        if team.local_size > 1:
            torch.cuda.set_device(device)
        return device

    def threads(self, team: Team = SINGLE_PROCESS) -> int | None:
        """CPU threads of each process; None for PyTorch's default."""
        if self.num_threads is None and team.local_size > 1:
            return max(1, cpu_count() // team.local_size)
        return self.num_threads

    def torch_dtype(self, checkpoint_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of forward passes. `auto` is the checkpoint's own dtype, but float32 instead of float16 on a CPU,
        which has no fast float16 matrix products."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        if checkpoint_dtype == torch.float16 and device.type == "cpu":
            return torch.float32
        return checkpoint_dtype if checkpoint_dtype in DTYPES.values() else torch.float32


def _check_distinct(device: torch.device, team: Team) -> None:
    used = team.gather(str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None)
    distinct = len(set(used) - {None})
    if distinct not in (0, len(used)):
        raise ResourceError(f"{len(used)} processes have {distinct} CUDA devices between them; use runtime.device=cpu")
