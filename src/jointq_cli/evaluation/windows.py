"""The evaluation text cut into windows, and which of their tokens are scored."""

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jointq_cli.data.text import TextSource
from jointq_cli.errors import ConfigError, TextError
from jointq_cli.setting_rules import setting


@dataclass(frozen=True)
class Evaluation(TextSource):
    """Which text is scored, and how: windows of `seqlen` tokens that start `stride` tokens apart (default: seqlen).

    Every token of a window is predicted from those before it; of an overlapping window only the last `stride` count.
    `bos`: none, first (once, before the complete text, as in GPTQ's protocol for Llama) or each (before each window).

    tasks: names of lm-eval's tasks, which are measured too, and of those whose YAML files are in `tasks_dir`;
    tasks_limit: only the first so many samples of each.
    """

    seqlen: int = setting(512, least=2)
    stride: int | None = setting(None)
    max_windows: int | None = setting(None, least=1, null="for all")
    bos: str = setting("none", choices=("none", "first", "each"))
    tasks: list[str] = setting([], pattern=".+", form="name a task of lm-eval")
    tasks_dir: str | None = setting(None, place=True)
    tasks_limit: int | None = setting(None, least=1, null="for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride is not None and not 1 <= self.stride <= self.seqlen:
            raise ConfigError(f"evaluation.stride={self.stride}: must be from 1 to evaluation.seqlen={self.seqlen}")
        if self.tasks_dir is not None and not self.tasks:
            raise ConfigError(f"evaluation.tasks_dir={self.tasks_dir}: add evaluation.tasks=[NAME] of a task in it")


@dataclass(frozen=True)
class ScoredWindows:
    """Token windows and which of their tokens count: ids (windows, tokens) int64, scored (windows, tokens) bool."""

    ids: Tensor
    scored: Tensor
    stride: int  # tokens of text from one window to the next
    provenance: dict[str, str] = field(default_factory=dict)  # of the text: revision, sha256 and the like

    def part(self, own: slice) -> "ScoredWindows":
        """The windows `own` alone."""
        return replace(self, ids=self.ids[own], scored=self.scored[own])

    @property
    def hash(self) -> str:
        """sha256 over ids and scored positions, 64 hex digits."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(self.scored.numpy().tobytes())
        return digest.hexdigest()


def cut_windows(
    ids: Tensor, evaluation: Evaluation, bos_id: int | None, provenance: dict[str, str] | None = None
) -> ScoredWindows:
    """Windows over a text of ids (tokens,) int64; an incomplete last window is dropped, as is customary.

    Raises ConfigError if `bos` needs a token that the tokenizer does not have, TextError if no window fits.
    """
    if evaluation.bos != "none" and bos_id is None:
        raise ConfigError(f"evaluation.bos={evaluation.bos}: this tokenizer has no BOS token; use evaluation.bos=none")
    if evaluation.bos == "first":
        ids = torch.cat([torch.tensor([bos_id]), ids])
    room = evaluation.seqlen - (evaluation.bos == "each")
    stride = min(evaluation.stride or room, room)
    if len(ids) < room:
        raise TextError(
            f"evaluation.seqlen={evaluation.seqlen}: the text has {len(ids)} tokens, not one window; "
            "shorten the window or give a longer text"
        )
    windows = ids.unfold(0, room, stride)[: evaluation.max_windows].contiguous()
    scored = torch.zeros(windows.shape, dtype=torch.bool)
    scored[:, room - stride :] = True  # of an overlapping window, the tokens that no earlier window has scored
    scored[0] = True
    if evaluation.bos == "each":
        windows = torch.cat([torch.full((len(windows), 1), bos_id or 0), windows], dim=1)
        scored = torch.cat([torch.zeros(len(scored), 1, dtype=torch.bool), scored], dim=1)
    scored[:, 0] = False  # it has no preceding token
    return ScoredWindows(windows, scored, stride, provenance or {})
