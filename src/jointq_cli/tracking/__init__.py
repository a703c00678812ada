"""Where a run is logged besides its directory: MLflow, Weights & Biases, TensorBoard.

`base` has the interface, a module for each service implements it, `tracked_run` passes on what a run reports.
"""

from jointq_cli.tracking.base import NoTracking, Tracker, Tracking
from jointq_cli.tracking.mlflow import MlflowTracking
from jointq_cli.tracking.tensorboard import TensorboardTracking
from jointq_cli.tracking.tracked_run import TrackedRun, tracked
from jointq_cli.tracking.wandb import WandbTracking

__all__ = [
    "MlflowTracking",
    "NoTracking",
    "TensorboardTracking",
    "TrackedRun",
    "Tracker",
    "Tracking",
    "WandbTracking",
    "tracked",
]
