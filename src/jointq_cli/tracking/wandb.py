"""Runs in Weights & Biases. WANDB_MODE=offline keeps them in the run directory, for `wandb sync`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointq_cli.setting_rules import setting
from jointq_cli.tracking.base import Tracker, Tracking


@dataclass(frozen=True)
class WandbTracking(Tracking):
    name = "wandb"
    module = "wandb"

    project: str = setting("jointq", decides=False)
    entity: str | None = setting(None, null="for the default one of the account", decides=False)

    def open(self, run: str, sweep: str, directory: Path) -> Tracker:
        import wandb  # takes a second

        settings = wandb.Settings(silent=True, console="off")  # the screen is the console's
        return WandbRun(
            wandb.init(
                project=self.project,
                entity=self.entity,
                name=run,
                group=sweep or None,
                dir=str(directory),
                reinit="create_new",  # the jobs of a sweep follow each other in one process
                settings=settings,
            )
        )


class WandbRun(Tracker):
    def __init__(self, run: Any) -> None:
        self._run = run
        self._run.define_metric("block", hidden=True)
        self._run.define_metric("*", step_metric="block")

    def parameters(self, values: Mapping[str, str]) -> None:
        self._run.config.update(dict(values))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "block": step})

    def figures(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def files(self, paths: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
        for path in paths:
            artifact.add_file(str(path))
            if path.suffix == ".html":
                self._run.log({path.stem: wandb.Html(str(path), inject=False)})
        self._run.log_artifact(artifact)

    def close(self, problem: str) -> None:
        if problem:
            self._run.summary["problem"] = problem
        self._run.finish(exit_code=1 if problem else 0)
