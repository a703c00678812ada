"""Passes on to a tracking service what a run reports: the recipe, each layer, the figures, the report, how it ended."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jointq_cli.errors import ResourceError
from jointq_cli.records import LayerRecord, RunReport, StageRecord
from jointq_cli.report import Console
from jointq_cli.report.measured import figures
from jointq_cli.tracking.base import Tracker, Tracking

FILES = ("report.html", "report.md", "report.json", "layers.csv", "recipe.yaml", "manifest.json", "log.txt")


class TrackedRun:
    """Listens to the console for the service. What the service refuses is a warning, and the run goes on without it."""

    def __init__(self, tracker: Tracker, service: str, warn: Callable[[str], None]) -> None:
        self._tracker = tracker
        self._service = service
        self._warn = warn
        self._logged: set[str] = set()  # layers

    def begins(self, parameters: Mapping[str, str]) -> None:
        self._send(lambda tracker: tracker.parameters(parameters))

    def has_computed(self, record: LayerRecord | StageRecord) -> None:
        if isinstance(record, LayerRecord):
            self._logged.add(record.name)
            self._points(_of_layer(record), record.block)
        else:
            seconds = {f"seconds/{record.name.replace(' ', '_')}": record.seconds}
            self._send(lambda tracker: tracker.figures(seconds))

    def has_report(self, report: RunReport) -> None:
        """The layers that were not shown, since they come from the store, and what is known only now."""
        for layer in report.layers:
            if layer.name not in self._logged:
                self.has_computed(layer)
        for block in report.blocks:
            self._points({"block/output_error": block.output_error}, block.block)
        self._send(lambda tracker: tracker.figures(_of_run(report)))

    def ends(self, directory: Path, problem: str) -> None:
        paths = [directory / name for name in FILES if (directory / name).is_file()]
        self._send(lambda tracker: tracker.files(paths))
        self._send(lambda tracker: tracker.close(problem))

    def _points(self, values: Mapping[str, float], step: int) -> None:
        self._send(lambda tracker: tracker.metrics(values, step))

    def _send(self, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = Tracker()
            self._warn(f"tracking={self._service}: {_one_line(error)}; the run goes on without it")


@contextmanager
def tracked(
    tracking: Tracking, directory: Path, parameters: Mapping[str, str], console: Console, *, in_sweep: bool
) -> Iterator[TrackedRun]:
    """Inside, what the console shows goes to the service too; failed and interrupted runs are marked as such there.

    Raises ConfigError where its library is not installed, ResourceError where it cannot be reached at the start.
    """
    tracking.require_installed()
    place = directory.absolute()
    try:
        tracker = tracking.open("/".join(place.parts[-2:]), place.parent.name if in_sweep else "", place)
    except Exception as error:
        raise ResourceError(f"tracking={tracking.name}: {_one_line(error)}") from error
    run = TrackedRun(tracker, tracking.name, console.warn)
    console.add(run.has_computed)
    run.begins(parameters)
    try:
        yield run
    except BaseException as error:
        run.ends(place, _one_line(error))
        raise
    run.ends(place, "")


def _of_layer(record: LayerRecord) -> dict[str, float]:
    """By the layer's name inside its block, so that a curve runs over the blocks."""
    place = record.name.partition(f".{record.block}.")[2] or record.name
    values = {"output_error": record.output_error, "weight_error": record.weight_error}
    return {f"{name}/{place}": value for name, value in {**values, "bits_per_weight": record.bits_per_weight}.items()}


def _of_run(report: RunReport) -> dict[str, float]:
    return {name: figure.value for name, figure in figures(report).items()}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ResourceError) else f"{type(error).__name__}: {text}".rstrip(": ")
