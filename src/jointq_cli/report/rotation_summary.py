"""What a rotation achieved, in sentences and key metrics: the one source for the terminal, Markdown and HTML."""

from statistics import fmean

from jointq_cli.records import RotationRecord, Site
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import KeyMetric, byte_size, listed, relative_change, significant

MOST_ROUNDING = 1.5  # times the original model's rounding error
LEAST_MOVE = 1e-6  # |R - R0| / |R0| of a learned rotation; rounding R0 to float32 alone gives 1e-7
ONLINE = "needed whenever the model runs, so plain transformers refuses the checkpoint"


def headline(record: RotationRecord) -> str:
    """The effect of the new basis in one line."""
    before, after = mean_sqnr(record.sites)
    return (
        f"{' + '.join(filter(None, [record.smoothing, record.rotation]))}: SQNR of activations at 4 bits "
        f"{before:.1f} → {after:.1f} dB, logits the same within {record.invariance.merge:.1e}"
    )


def mean_sqnr(sites: list[Site]) -> tuple[float, float]:
    """dB before and after the rotation, the mean over `sites`."""
    count = max(1, len(sites))
    return sum(site.sqnr_before for site in sites) / count, sum(site.sqnr_after for site in sites) / count


def problems(record: RotationRecord) -> list[str]:
    """Reasons not to trust a rotation: it rounds more than the original model does, or training did not move it."""
    found, invariance = [], record.invariance
    if invariance.rounding > 0 and invariance.stored > MOST_ROUNDING * invariance.rounding:
        times = f"{invariance.stored / invariance.rounding:.1f} x as much as the original in {invariance.dtype}"
        found.append(f"the rotated model rounds {times}")
    if unmoved := [training.name for training in record.courses if training.moved < LEAST_MOVE]:
        found.append(f"nothing was learned for {listed(unmoved)}")
    return found


def metrics(record: RotationRecord) -> list[KeyMetric]:
    """One metric per kind of site, then those that show that the model still computes the same function."""
    found = []
    for kind, sites in grouped(record.sites, lambda site: site.name).items():
        before, after = mean_sqnr(sites)
        peaks = fmean(site.peak_before for site in sites), fmean(site.peak_after for site in sites)
        detail = f"max/rms {peaks[0]:.1f} → {peaks[1]:.1f}"
        found.append(KeyMetric(f"SQNR of {kind}", f"{before:.1f} → {after:.1f} dB", detail))
    invariance = record.invariance
    scope = f"relative error of the logits in float32, {invariance.tokens} tokens"
    found.append(KeyMetric("invariance", f"{invariance.merge:.1e}", scope))
    if invariance.rounding > 0:
        rounding = f"as stored in {invariance.dtype}; the original's own rounding {invariance.rounding:.1e}"
        found.append(KeyMetric("rounding", f"{invariance.stored:.1e}", rounding))
    return [*found, KeyMetric("orthogonality", f"{record.orthogonality_error:.1e}", "largest |R R^T - I|")]


def provenance(record: RotationRecord) -> list[tuple[str, str]]:
    """How the basis was constructed, as (label, value)."""
    found = [("rotation", record.rotation or "none"), ("smoothing", record.smoothing or "none")]
    found += [("built of", text) for text in record.constructions]
    for course in [course for course in record.courses if course.name == "R1"] or record.courses[:1]:
        losses = f"{significant(course.loss_before)} → {significant(course.loss_after)}"
        kept = f"{course.steps} steps, that of {course.best_step} kept"
        found.append((f"learned {course.name}", f"{kept}; loss {losses}, moved {significant(course.moved, 2)}"))
    growth = record.rotated_bytes / record.source_bytes - 1 if record.source_bytes else 0.0
    if growth > 0.001:
        size = f"{byte_size(record.rotated_bytes)}, {relative_change(growth)}"
        found.append(("weights", f"{size} (input and output embeddings are untied)"))
    return [*found, *online(record), ("basis hash", record.hash)]


def online(record: RotationRecord) -> list[tuple[str, str]]:
    """The rotations that the model must apply at run time, as (label, value)."""
    return [("online", f"{name}: {ONLINE}") for name in record.online]
