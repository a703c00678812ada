"""Finished runs on disk: which run directories the paths of a command line stand for, and what is read from each.

Knows the file names of a run directory, the layout of a sweep and the form of recipe.yaml. Compares nothing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jointq_cli.errors import JointqError
from jointq_cli.report.compare.runs import ComparedRun
from jointq_cli.setting_rules import RENAMED
from jointq_cli.system.record_json import load_report
from jointq_cli.system.sweep_directory import DONE, SweepDirectory

REPORT, EVALUATION, RECIPE = "report.json", "evaluation.json", "recipe.yaml"
ORDERED = "layers.overrides"  # one value, since the order of its entries counts, and their names have dots


@dataclass(frozen=True)
class FoundRuns:
    """Run directories in the order of the command line, those of a sweep by their numbers."""

    finished: list[Path]
    unfinished: list[Path]  # jobs of a sweep that have no report


def find_runs(paths: Sequence[Path]) -> FoundRuns:
    """paths: run directories and sweeps; a run that is named twice counts once.

    Raises JointqError for a path that is neither, for a sweep without any result, and for a single run.
    """
    found = [_runs_at(path) for path in paths]
    finished = list({path.resolve(): path for entry in found for path in entry.finished}.values())
    if len(finished) == 1 and finished[0] in paths:
        raise JointqError(f"{finished[0]}: one run alone; name at least two, or a sweep")
    return FoundRuns(finished, [path for entry in found for path in entry.unfinished])


def load_runs(paths: Sequence[Path]) -> tuple[list[ComparedRun], list[str]]:
    """The runs whose report and recipe can be read, and why the others cannot, a line each.

    Raises JointqError, the first such line, where fewer than two are left of several.
    """
    names, found, unreadable = _names(paths), [], []
    for name, path in zip(names, paths, strict=True):
        try:
            found.append(ComparedRun(name, load_report(path / REPORT), load_settings(path / RECIPE)))
        except JointqError as error:
            unreadable.append(str(error))
    if unreadable and len(found) < 2:
        raise JointqError(unreadable[0])
    return found, unreadable


def _runs_at(path: Path) -> FoundRuns:
    try:
        if not path.is_dir():
            raise JointqError(f"{path}: no such directory")
        if (path / REPORT).is_file():
            return FoundRuns([path], [])
        runs = sorted((run for run in path.iterdir() if run.name.isdecimal()), key=lambda run: int(run.name))
    except OSError as error:
        raise JointqError(f"{path}: cannot be read ({error.strerror})") from error
    sweep = SweepDirectory(path)
    if sweep.exists:  # other numbered directories do not belong to it
        runs = [sweep.run(number) for number in range(len(sweep.plan().settings))]
        finished = [run for number, run in enumerate(runs) if _is_done(sweep, number)]
        return _runs_of_sweep(path, runs, finished)
    if not runs:
        raise JointqError(f"{path}: neither a finished run, which has a {REPORT}, nor a sweep of runs 0, 1, ...")
    return _runs_of_sweep(path, runs, [run for run in runs if (run / REPORT).is_file()])


def _runs_of_sweep(path: Path, runs: list[Path], finished: list[Path]) -> FoundRuns:
    if not finished:
        raise JointqError(f"{path}: no run of this sweep has finished; a finished one has a {REPORT}")
    return FoundRuns(finished, [run for run in runs if run not in finished])


def _is_done(sweep: SweepDirectory, number: int) -> bool:
    return sweep.record(number).state == DONE and (sweep.run(number) / REPORT).is_file()


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many of the last parts as make the names unique."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return [str(Path(*path[-depth:])) for path in parts]


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
