"""Whether two runs are the same run: what was requested, computed and measured, in the order of the pipeline.

A step is a comparison of two dictionaries. Files are compared by their hashes, counts and words exactly, floats to nine
digits, since the last ones depend on the order in which threads add. NaN equals NaN: who measures it again has the same
run.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from jointq_cli.errors import ModelError
from jointq_cli.formats.layer_file import load_layer
from jointq_cli.records import (
    COMPUTED,
    DIFFERENT,
    IDENTICAL,
    MEASURED,
    REQUESTED,
    WITHIN_TOLERANCE,
    ComparedStep,
    ReplayedMetric,
    Reproduction,
    RunReport,
)
from jointq_cli.report import summary
from jointq_cli.report.finished_run import CHECKPOINT, CODES, FinishedRun, codes_file
from jointq_cli.report.number_format import percent, relative_change, significant
from jointq_cli.report.tables.table import TableDocument, TextTable
from jointq_cli.setting_rules import UNSET, SettingRoles
from jointq_cli.system.machine import LIBRARIES

ROUNDING = 1e-9  # relative: of float64 sums whose order depends on the threads; one changed code has a larger effect
NOT_COMPARED = {"seconds", "label"}  # of records; older reports lack labels
ROTATION = "rotation/rotation.safetensors"
HARDWARE = ("device", "gpu", "cpu", "threads", "processes")
TEXTS = {"calibration tokens": "calibration", "evaluation windows": "evaluation"}  # step -> text of the manifest
INPUTS = ("config", "model", *TEXTS)
FOLDERS = {"rotation": "rotation/", "codes": CODES, "checkpoint": CHECKPOINT, "exports": "export/"}  # by step
Facts = Mapping[str, Any]  # values, and dictionaries of values, by name
Runs = tuple[FinishedRun, FinishedRun]
Settings = Mapping[str, str]  # values as text by dotted key, and the option by group


def compare(
    original: FinishedRun, replay: FinishedRun, roles: SettingRoles, tolerance: float | None = None
) -> Reproduction:
    """tolerance: relative, for both perplexities and KL divergence. It applies to runs with the same config on the same
    tokens whose hardware or libraries can round differently. None: the runs must be identical."""
    runs = (original, replay)
    ours, theirs = map(_facts, runs)
    steps = [_step(name, ours[name], theirs[name], runs) for name in ours]
    # A setting that only one run has was added or removed by another version of the code, where it has an implicit
    # value. Only identical results show that it is the same value.
    suspect = not all(step.same for step in steps)
    a, b = map(_settings, runs)
    config = _deciding(a, b, roles, one_sided=suspect), _deciding(b, a, roles, one_sided=suspect)
    steps.insert(0, _step("config", *config, runs))
    metrics = [
        ReplayedMetric(name, value, other, _change(value, other) if math.isfinite(value + other) else math.inf)
        for (name, value), other in zip(
            _metrics(original.report).items(), _metrics(replay.report).values(), strict=True
        )
    ]
    changes = _changes(*map(_surroundings, runs))
    rounding = [text for name, text in changes.items() if name in (*LIBRARIES, *HARDWARE)]
    if None in (original.manifest.cpu, replay.manifest.cpu):  # one that a manifest lacks does not count
        rounding = [text for text in rounding if text != changes.get("cpu")]
    verdict, sentence = _verdict(steps, metrics, tolerance, rounding)
    return Reproduction(
        original=str(original.directory),
        replay=str(replay.directory),
        verdict=verdict,
        steps=steps,
        surroundings=list(changes.values()),
        figures=metrics,
        tolerance=tolerance,
        rounding=rounding,
        unknown=_unknown(original, replay),
        problems=summary.problems(replay.report),
        sentence=sentence,
    )


def reproduction_document(found: Reproduction) -> TableDocument:
    """The verdict, every step, and where and probably why the runs differ first."""
    first, notes = found.first_difference, []
    if first is not None:
        before = "" if first is found.steps[0] else "; everything before it is identical"
        notes.append(f"it begins with: {first.name}: {first.detail}{before}")
    if found.surroundings:
        notes.append(f"machine, libraries or code differ: {', '.join(found.surroundings)}")
    elif first is not None and first.part != REQUESTED:
        cause = "" if found.unknown else ": something is not deterministic"
        notes.append(f"no difference of machine, libraries or code is recorded{cause}")
    if found.unknown and first is not None:
        notes.append(f"not known to be the same: {', '.join(found.unknown)}")
    columns = {
        "step": lambda step: step.name,
        "was": lambda step: step.part,
        "outcome": lambda step: "identical" if step.same else "differs",
        "detail": lambda step: step.detail,
    }
    return TableDocument(
        title="reproduction",
        headline=found.sentence,
        warnings=[f"the replay itself: {problem}" for problem in found.problems],
        notes=notes,
        tables=[TextTable.of(f"{found.original} and {found.replay}", found.steps, columns, stub=len(columns))],
    )


def deciding_differences(ours: Settings, theirs: Settings, roles: SettingRoles) -> list[str]:
    """Such as "quantizer.bits 4 → 3", for each deciding setting that both runs have and each entry of a dictionary that
    one has; a run may lack an empty one."""
    return list(_changes(_deciding(ours, theirs, roles), _deciding(theirs, ours, roles)).values())


def _deciding(settings: Settings, others: Settings, roles: SettingRoles, *, one_sided: bool = False) -> Settings:
    """one_sided: with those that the other run does not have, unless they ask for nothing."""
    return {
        key: value
        for key, value in settings.items()
        if roles.decides(key)
        and (key in others or (one_sided and value not in UNSET) or (roles.is_entry(key) and value != "{}"))
    }


def _settings(run: FinishedRun) -> Settings:
    """Without those of experts, where there are none."""
    has_experts = any(layer.tokens is not None for layer in run.report.layers)
    return {key: value for key, value in run.settings.items() if has_experts or key.partition(".")[0] != "experts"}


def _facts(run: FinishedRun) -> dict[str, Facts]:
    """What is compared, by step."""
    report, hashes = run.report, run.manifest.hashes
    likelihoods = {
        "original": asdict(report.original) | {"value": None},
        "quantised": asdict(report.quantized) | {"value": None},
        "comparison": asdict(report.comparison) | {"kl_divergence": None},
    }
    return {
        **{name: {"sha256": hashes.get(name)} for name in ("model", *TEXTS)},
        "rotation": {"sha256": report.rotation.hash} if report.rotation else {},
        "codes": {layer.name: run.files.get(codes_file(layer.name)) for layer in report.layers},
        "layers": {layer.name: asdict(layer) for layer in report.layers},
        "blocks": {f"block {block.block}": asdict(block) for block in report.blocks},
        "checkpoint": run.files_in(CHECKPOINT),
        "exports": run.files_in(FOLDERS["exports"]),
        "audit": asdict(report.audit),
        "reload check": {"": report.reload_check},
        "simulation": asdict(report.simulation) if report.simulation else {},
        "likelihoods": likelihoods,
        "tasks": {task.name: asdict(task) for task in report.tasks},
        **{name: {"": value} for name, value in _metrics(report).items()},
    }


def _metrics(report: RunReport) -> dict[str, float]:
    """The measurements to which a tolerance applies."""
    return {
        "original perplexity": report.original.value,
        "quantised perplexity": report.quantized.value,
        "KL divergence": report.comparison.kl_divergence,
    }


def _position(path: str, report: RunReport) -> int | None:
    """Of a value of a layer or block in the order of the run, where a block comes after its layers."""
    layers = [(layer.block, 0, layer.name) for layer in report.layers]
    blocks = [(block.block, 1, f"block {block.block}") for block in report.blocks]
    order = sorted([*layers, *blocks], key=lambda entry: entry[:2])
    return next((at for at, (_, _, name) in enumerate(order) if f"{path}.".startswith(f"{name}.")), None)


def _step(name: str, ours: Facts, theirs: Facts, runs: Runs) -> ComparedStep:
    part = COMPUTED if name in FOLDERS else REQUESTED if name in INPUTS else MEASURED
    a, b = dict(_leaves(ours)), dict(_leaves(theirs))
    gaps = {path: _gap(a.get(path), b.get(path)) for path in dict.fromkeys([*a, *b])}
    differing = [path for path, gap in gaps.items() if gap > ROUNDING]
    if not differing:
        largest = max(gaps.values(), default=0.0)
        rounded = f", but for sums' last digits: {largest:.0e} at most" if largest else ""
        shown = _text(*a.values()) if len(gaps) == 1 else f"all {len(gaps)}" if gaps else "none"
        return ComparedStep(name, part, True, f"{shown}{rounded}{_by_manifest(name, runs)}")
    first = differing[0]
    count = f"{len(differing)} of {len(gaps)}, first " * (len(gaps) > 1)
    change = f"{first} {_values(a.get(first), b.get(first))}".lstrip()
    detail = "; ".join([f"{count}{change}", *_further(name, first, runs)])
    return ComparedStep(name, part, False, detail, _position(first, runs[0].report))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested dictionaries by dotted path."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        if key not in NOT_COMPARED:
            yield from _leaves(item, f"{path}.{key}" if path else key)


def _gap(ours: Any, theirs: Any) -> float:
    """0 for equal values, the relative difference of floats, infinity for anything else that differs."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return max(map(_gap, ours, theirs), default=0.0)
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(_change(ours, theirs))
    return 0.0 if ours == theirs else math.inf


def _change(ours: float, theirs: float) -> float:
    """Relative to `ours`; infinite if that is undefined."""
    if ours == theirs or (math.isnan(ours) and math.isnan(theirs)):
        return 0.0
    change = (theirs - ours) / abs(ours) if ours else math.inf
    return math.inf if math.isnan(change) else change


def _values(ours: Any, theirs: Any) -> str:
    text = " → ".join("not there" if value is None else _text(value) for value in (ours, theirs))
    if not (isinstance(ours, float) and isinstance(theirs, float)):
        return text
    change = _change(ours, theirs)  # in enough digits that it does not look like zero
    return f"{text} ({relative_change(change) if abs(change) >= 1e-4 else f'{change:+.1e}'})"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return significant(value)
    return str(value)[:16] if re.fullmatch("[0-9a-f]{64}", str(value)) else str(value)


def _by_manifest(name: str, runs: Runs) -> str:
    """A remark where hashes are from a manifest because the file does not exist any more."""
    files = [run.directory / file for run in runs for file in run.files_in(FOLDERS.get(name, " "))]
    return "" if all(file.is_file() for file in files) else " (by the manifest; files not there)"


def _further(name: str, key: str, runs: Runs) -> Iterator[str]:
    """What else is known of a difference: the properties of a text, and how far tensors are apart, if still there."""
    if name in TEXTS:
        yield from _changes(*(run.manifest.texts.get(TEXTS[name], {}) for run in runs)).values()
    describe = {"codes": _codes_difference, "rotation": _rotation_difference}.get(name)
    files = [run.directory / (ROTATION if name == "rotation" else codes_file(key)) for run in runs]
    if describe is not None and all(file.is_file() for file in files):
        try:
            yield describe(*files)
        except (SafetensorError, ModelError, OSError, KeyError, ValueError):  # raised for damaged files
            yield "(file cannot be read)"


def _codes_difference(ours: Path, theirs: Path) -> str:
    found = load_layer(ours).difference(load_layer(theirs))
    return ", ".join(each.text + (f" by up to {percent(each.relative)}" if each.relative else "") for each in found)


def _rotation_difference(ours: Path, theirs: Path) -> str:
    a, b = load_file(ours), load_file(theirs)
    if {name: part.shape for name, part in a.items()} != {name: part.shape for name, part in b.items()}:
        return "of other parts"
    gaps = {name: (a[name].double() - b[name].double()).abs().max().item() for name in sorted(a)}
    return ", ".join(f"{name} by up to {gap:.1e}" for name, gap in gaps.items() if gap)


def _surroundings(run: FinishedRun) -> dict[str, str | None]:
    """Machine, libraries and code."""
    manifest = run.manifest
    hardware = {name: getattr(manifest, name) for name in HARDWARE}
    return {
        **manifest.versions,
        "commit": manifest.commit and manifest.commit[:12] + manifest.commit[40:],  # which may end in -dirty
        "platform": manifest.platform,
        **{name: None if value is None else str(value) for name, value in hardware.items()},
    }


def _changes(ours: Mapping[str, str | None], theirs: Mapping[str, str | None]) -> dict[str, str]:
    """By name, such as "torch 2.9.0 → 2.13.0"."""
    names = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
    return {name: f"{name} {_values(ours.get(name), theirs.get(name))}" for name in names}


def _unknown(original: FinishedRun, replay: FinishedRun) -> list[str]:
    """What may differ unnoticed, because it is not recorded."""
    ours, theirs = original.manifest, replay.manifest
    found = []
    if ours.commit == theirs.commit and (ours.commit is None or ours.commit.endswith("-dirty")):
        found.append("the code (no commit is recorded)" if ours.commit is None else "the code (not committed)")
    return found + ["the processor (not in both manifests)"] * (None in (ours.cpu, theirs.cpu))


def _verdict(
    steps: Sequence[ComparedStep], metrics: Sequence[ReplayedMetric], tolerance: float | None, rounding: Sequence[str]
) -> tuple[str, str]:
    """The verdict, and as a sentence."""
    if all(step.same for step in steps):
        return IDENTICAL, "identical: the same bits were computed, and the same was measured"
    if tolerance is None:
        return DIFFERENT, "different"
    share = percent(tolerance)
    if not all(step.same for step in steps if step.part == REQUESTED):
        return DIFFERENT, f"different: a tolerance of {share} is for runs with the same config on the same tokens"
    if not rounding:
        return DIFFERENT, f"different: a tolerance of {share} is for other hardware or libraries, and none are recorded"
    worst = max(metrics, key=lambda metric: abs(metric.change))
    moved = f"{worst.name} moved most, by {relative_change(worst.change)}"
    if abs(worst.change) <= tolerance:
        return WITHIN_TOLERANCE, f"not identical, but within {share}: {moved}"
    return DIFFERENT, f"different by more than {share}: {moved}"
