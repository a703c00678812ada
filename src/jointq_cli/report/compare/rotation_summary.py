"""What a rotation brought, in words and figures: the one place where its record becomes sentences."""

import statistics

from jointq_cli.records import RotationRecord, Site
from jointq_cli.report import number_format as units
from jointq_cli.report.number_format import KeyFigure

MOST_ROUNDING = 1.5  # x the original's own
LEAST_MOVE = 1e-6  # of a rotation; its start, rounded to float32, has moved by 1e-7


def headline(record: RotationRecord) -> str:
    """What the new basis brings, in one line."""
    before, after = mean_sqnr(record.sites)
    return (
        f"{' + '.join(names(record))}: SQNR of activations at 4 bits "
        f"{before:.1f} → {after:.1f} dB, logits the same within {record.invariance.merge:.1e}"
    )


def mean_sqnr(sites: list[Site]) -> tuple[float, float]:
    """dB before and after, the mean over sites."""
    count = max(1, len(sites))
    return sum(site.sqnr_before for site in sites) / count, sum(site.sqnr_after for site in sites) / count


def problems(record: RotationRecord) -> list[str]:
    """What speaks against a rotation: one that rounds more than the original does, or that learned nothing."""
    found = []
    invariance = record.invariance
    if invariance.rounding > 0 and invariance.stored > MOST_ROUNDING * invariance.rounding:
        found.append(
            f"the rotated model rounds {invariance.stored / invariance.rounding:.1f} x as much as the original in "
            f"{invariance.dtype}"
        )
    idle = [course.name for course in record.courses if course.moved < LEAST_MOVE]
    if idle:
        found.append(f"nothing was learned for {units.listed(idle)}")
    return found


def figures(record: RotationRecord) -> list[KeyFigure]:
    """One figure per kind of site, and what shows that the model is still the same."""
    kinds = dict.fromkeys(site.name for site in record.sites)
    found = []
    for kind in kinds:
        sites = [site for site in record.sites if site.name == kind]
        before, after = mean_sqnr(sites)
        peak_before = statistics.mean(site.peak_before for site in sites)
        peak_after = statistics.mean(site.peak_after for site in sites)
        peaks = f"max/rms {peak_before:.1f} → {peak_after:.1f}"
        found.append(KeyFigure(f"SQNR of {kind}", f"{before:.1f} → {after:.1f} dB", peaks))
    invariance = record.invariance
    remark = f"relative error of the logits in float32, {invariance.tokens} tokens"
    found.append(KeyFigure("invariance", f"{invariance.merge:.1e}", remark))
    if invariance.rounding > 0:
        rounding = f"as stored in {invariance.dtype}; the original's own rounding {invariance.rounding:.1e}"
        found.append(KeyFigure("rounding", f"{invariance.stored:.1e}", rounding))
    found.append(KeyFigure("orthogonality", f"{record.orthogonality_error:.1e}", "largest |R R^T - I|"))
    return found


def provenance(record: RotationRecord) -> list[tuple[str, str]]:
    """How the basis was found, as (what, value)."""
    courses = [course for course in record.courses if course.name == "R1"] or record.courses[:1]
    learned = [
        (
            f"learned {course.name}",
            f"{course.steps} steps, that of {course.best_step} kept; loss {units.significant(course.loss_before, 4)} → "
            f"{units.significant(course.loss_after, 4)}, moved {units.significant(course.moved, 2)}",
        )
        for course in courses
    ]
    grown = record.rotated_bytes / record.source_bytes - 1 if record.source_bytes else 0.0
    growth = f"{units.size(record.rotated_bytes)}, {units.change(grown)} (input and output embeddings are untied)"
    return [
        ("rotation", record.rotation or "none"),
        ("smoothing", record.smoothing or "none"),
        *(("built of", text) for text in record.constructions),
        *learned,
        *([("weights", growth)] if grown > 0.001 else []),
        *online(record),
        ("basis hash", record.hash),
    ]


def online(record: RotationRecord) -> list[tuple[str, str]]:
    needed = "needed whenever the model runs, so plain transformers refuses the checkpoint"
    return [("online", f"{name}: {needed}") for name in record.online]


def names(record: RotationRecord) -> list[str]:
    return [name for name in (record.smoothing, record.rotation) if name]
