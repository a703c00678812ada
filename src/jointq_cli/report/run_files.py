"""Runs on disk: the runs and sweeps that the paths of a command line stand for, and the settings in a recipe.yaml."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from jointq_cli.errors import JointqError
from jointq_cli.records import EvaluationReport
from jointq_cli.report.comparison import ComparedRun
from jointq_cli.report.measured import Report
from jointq_cli.setting_rules import RENAMED
from jointq_cli.system.record_json import load_record, load_report
from jointq_cli.system.sweep_directory import DONE, JobRecord, SweepDirectory

REPORT, EVALUATION, RECIPE = "report.json", "evaluation.json", "recipe.yaml"
ORDERED = "layers.overrides"  # one value, since the order of its entries counts, and their names have dots


def read_report(directory: Path) -> Report:
    """Of `jointq quantize` or `jointq evaluate`. Raises JointqError."""
    if (directory / REPORT).is_file():
        return load_report(directory / REPORT)
    if (directory / EVALUATION).is_file():
        return cast(EvaluationReport, load_record(EvaluationReport, directory / EVALUATION))
    if SweepDirectory(directory).exists:
        raise JointqError(f"{directory}: a sweep; name one of its runs, such as {directory / '0'}")
    raise JointqError(f"{directory}: has neither {REPORT} nor {EVALUATION}, so it is no finished run")


def load_jobs(sweep: SweepDirectory, numbers: Iterable[int] | None = None) -> list[ComparedRun]:
    """All jobs of a sweep, or some. Of one that is not done, a report is left by an earlier attempt."""
    settings = sweep.plan().settings
    return [
        _job(str(number), settings[number], sweep.run(number), sweep.record(number))
        for number in (range(len(settings)) if numbers is None else numbers)
    ]


def load_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """The runs of run directories and of sweeps, with the settings of their recipes; none counts twice.

    Raises JointqError for a path that is neither, and where fewer than two have a report that can be read.
    """
    places = {place.resolve(): (place, record) for path in paths for place, record in _places(path)}
    runs = [
        _job(name, {}, place, record)
        for name, (place, record) in zip(_names(list(places)), places.values(), strict=True)
    ]
    if sum(run.report is not None for run in runs) < 2:
        errors = [run.record.error for run in runs if run.record.error]
        number = "one finished run alone" if any(run.report for run in runs) else "no finished run"
        raise JointqError(errors[0] if errors else f"{paths[0]}: {number}; name at least two, or a sweep")
    return runs


def load_settings(path: Path) -> dict[str, str]:
    """Each value of a recipe.yaml as text by dotted key, and the chosen option by group. Raises JointqError.

    A key that has been renamed is under its new name.
    """
    try:
        return parse_settings(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise JointqError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise JointqError(f"{path}: not valid yaml ({error})") from error


def parse_settings(text: str, path: Path) -> dict[str, str]:
    """As `load_settings`; `text` is the content of `path`."""
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JointqError(f"{path}: not valid yaml ({error})") from error
    if not isinstance(recipe, dict):
        raise JointqError(f"{path}: not a recipe, which has keys with values")
    return {RENAMED.get(key, key): value for key, value in _settings(recipe)}


def _job(name: str, settings: dict[str, str], place: Path, record: JobRecord) -> ComparedRun:
    """settings: those of the recipe where none are given."""
    if record.state != DONE or (settings and not _has_report(place)):  # a rotation of a sweep leaves none
        return ComparedRun(name, settings, None, record)
    try:
        return ComparedRun(name, settings or load_settings(place / RECIPE), read_report(place), record)
    except JointqError as error:
        return ComparedRun(name, settings, None, JobRecord("left out", error=str(error)))


def _places(path: Path) -> list[tuple[Path, JobRecord]]:
    """Directories of runs; older sweeps have no plan."""
    sweep, done = SweepDirectory(path), JobRecord(DONE)
    if not path.is_dir():
        raise JointqError(f"{path}: no such directory")
    if sweep.exists:
        return [(sweep.run(number), sweep.record(number)) for number in range(len(sweep.plan().settings))]
    if _has_report(path):
        return [(path, done)]
    jobs = sorted((run for run in path.iterdir() if run.name.isdecimal()), key=lambda run: int(run.name))
    if not jobs:
        raise JointqError(f"{path}: neither a finished run, which has a {REPORT}, nor a sweep of runs 0, 1, ...")
    return [(run, done if (run / REPORT).is_file() else JobRecord("waiting")) for run in jobs]


def _has_report(run: Path) -> bool:
    return (run / REPORT).is_file() or (run / EVALUATION).is_file()


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many of the last parts as make the names unique."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [str(Path(*path.parts[-depth:])) for path in paths]


def _settings(recipe: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The option of each group under its name, then every key of it."""
    options = {
        word.rpartition("/")[2]: str(option)
        for entry in recipe.get("defaults") or []
        if isinstance(entry, dict)
        for word, option in entry.items()
    }
    for key, value in recipe.items():
        if key in options:
            yield key, options[key]
        if key != "defaults" and not (key in options and value == {}):
            yield from _leaves(key, value)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if key == ORDERED and value:
        yield key, json.dumps(value, ensure_ascii=False, default=str).replace('"', "")
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
