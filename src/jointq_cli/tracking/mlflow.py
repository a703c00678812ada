"""Runs in MLflow, by its client, which has no run that is active for the whole process."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointq_cli.setting_rules import setting
from jointq_cli.tracking.base import Tracker, Tracking

LONGEST_VALUE = 500  # characters; of longer parameters some stores refuse to keep any
MOST_AT_ONCE = 100  # parameters in one request


@dataclass(frozen=True)
class MlflowTracking(Tracking):
    name = "mlflow"
    module = "mlflow"

    uri: str | None = setting(None, null="for MLFLOW_TRACKING_URI or MLflow's own default", decides=False)
    experiment: str = setting("jointq", decides=False)

    def open(self, run: str, sweep: str, directory: Path) -> Tracker:
        if (self.uri or os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("file:"):
            # MLflow 3 asks those who want its file store to say so; whoever names one has.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient  # takes seconds to import

        client = MlflowClient(self.uri)
        tags = {"mlflow.source.name": "jointq", **({"sweep": sweep} if sweep else {})}
        return MlflowRun(client, client.create_run(_experiment(client, self.experiment), run_name=run, tags=tags))


class MlflowRun(Tracker):
    def __init__(self, client: Any, run: Any) -> None:
        self._client = client
        self._id: str = run.info.run_id

    def parameters(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        found = [Param(_name(key), value[:LONGEST_VALUE]) for key, value in values.items()]
        for first in range(0, len(found), MOST_AT_ONCE):
            self._client.log_batch(self._id, params=found[first : first + MOST_AT_ONCE])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(_name(key), value, now, step) for key, value in values.items()])

    def figures(self, values: Mapping[str, float]) -> None:
        self.metrics(values, 0)

    def files(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._client.log_artifact(self._id, str(path))

    def close(self, problem: str) -> None:
        if problem:
            self._client.set_tag(self._id, "problem", problem)
        self._client.set_terminated(self._id, "FAILED" if problem else "FINISHED")


def _experiment(client: Any, name: str) -> str:
    """The id of the experiment, which is made if there is none; another job may make it at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            made: str = client.create_experiment(name)
            return made
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    identity: str = found.experiment_id
    return identity


def _name(key: str) -> str:
    """With the characters that MLflow allows: keys of dictionaries may have any."""
    return re.sub(r"[^\w\-. :/]", "_", key)
