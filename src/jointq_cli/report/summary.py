"""What the report of one run says, in sentences and key metrics: the one source for the terminal, Markdown and HTML."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jointq_cli.records import (
    IDENTICAL,
    EvaluationReport,
    ExportRecord,
    LayerRecord,
    Perplexity,
    Protocol,
    RunReport,
    StageRecord,
    TaskRecord,
)
from jointq_cli.report import rotation_summary
from jointq_cli.report.grouping import grouped
from jointq_cli.report.measured import KINDS, Figure, costs, figures, kind_of
from jointq_cli.report.number_format import (
    KeyMetric,
    byte_size,
    duration,
    listed,
    percent,
    plural,
    plus_minus,
    relative_change,
    significant,
)

FALLBACK = "fallback"
DAMPED = "damped"
Pairs = list[tuple[str, str]]  # (label, value)


def title(report: RunReport) -> str:
    """ "Llama-3.2-1B, GPTQ W4 g128": a local model by the name of its directory, a hub model by its id."""
    path = Path(report.model)
    local = path.is_absolute() or report.model.startswith(".")
    return f"{path.name if local else report.model}, {report.quantizer}"


def headline(report: RunReport) -> str:
    """The result in one line."""
    before, after = significant(report.original.value), significant(report.quantized.value)
    increase = relative_change(figures(report)["perplexity_increase"].value)
    stored, found = f"{significant(report.bits_per_weight, 3)} bits per weight", report.coverage
    if found is not None and not found.is_complete:
        stored += (
            f" in {percent(found.share)} of the blocks' weights ({significant(found.block_bits, 3)} in all of them)"
        )
    if report.simulation is not None:
        stored += f" stored, {report.simulation.activations.split()[0]} simulated"
    divergence = significant(report.comparison.kl_divergence, 3)
    return f"{stored}; perplexity {before} → {after} ({increase}), KL {divergence} nats"


def sound(report: RunReport) -> str:
    """What is known of a run without problems."""
    source = "the rotated model" if report.rotation else "the source"
    trained = f" but for {plural(report.audit.refined, 'gain')} of norms that were trained" * bool(report.audit.refined)
    return (
        f"Every tensor that was not selected is identical to {source}{trained}, and the checkpoint reloaded from disk "
        "computes what the model in memory did."
    )


def basis(report: RunReport) -> Pairs:
    """Rotation and simulated activations of a run; empty for a run without them."""
    rotation, simulation = report.rotation, report.simulation
    found = [("rotation", rotation_summary.headline(rotation)), *rotation_summary.online(rotation)] if rotation else []
    return found + ([("simulated", f"{simulation.activations}; not in the checkpoint")] if simulation else [])


def problems(report: RunReport) -> list[str]:
    """Reasons not to use this checkpoint without a closer look, the worst first. Empty for a clean run."""
    found = [] if report.audit.passed else [f"audit failed: {audit_verdict(report)}"]
    found += _perplexity_problems("the original model's perplexity", report.original, report.protocol)
    found += _perplexity_problems("the quantised model's perplexity", report.quantized, report.protocol)
    if fallbacks := [layer.name for layer in report.layers if layer.verdict == FALLBACK]:
        found.append(f"{plural(len(fallbacks), 'layer')} fell back to RTN: {listed(fallbacks)}")
    found += rotation_summary.problems(report.rotation) if report.rotation else []
    if report.reload_check != IDENTICAL:
        found.append(f"the checkpoint reloaded from disk differs from the model in memory: {report.reload_check}")
    exports = [problem for record in report.exports if record.check for problem in record.check.problems]
    return found + report.failed_exports + exports + report.beyond_limits


def evaluation_problems(report: EvaluationReport) -> list[str]:
    """Reasons not to use the result of `jointq evaluate`."""
    found = report.problems + _perplexity_problems("the perplexity", report.perplexity, report.protocol)
    if report.comparison is not None and not math.isfinite(report.comparison.nll_increase):
        found = found or [f"the difference from the reference is {report.comparison.nll_increase}"]
    return found


def _perplexity_problems(name: str, perplexity: Perplexity, protocol: Protocol) -> list[str]:
    wider = "" if protocol.dtype == "float32" else "; try runtime.dtype=float32"
    return [] if math.isfinite(perplexity.value) else [f"{name} is {perplexity.value} in {protocol.dtype}{wider}"]


def audit_verdict(report: RunReport) -> str:
    """The audit in one line: counts, or the first names of the tensors that are wrong."""
    audit = report.audit
    groups = {"missing": audit.missing, "unexpected": audit.unexpected, "changed": audit.changed}
    if wrong := [f"{len(names)} {what} ({listed(names)})" for what, names in groups.items() if names]:
        return ", ".join(wrong)
    refined = f", {plural(audit.refined, 'gain')} of norms refined" if audit.refined else ""
    return f"passed: {plural(audit.quantized, 'tensor')} quantised{refined}, {audit.identical} identical to the source"


def layer_verdicts(report: RunReport) -> str:
    """ "210 layers: 208 ok, 1 damped, 1 fallback"."""
    counts = Counter(layer.verdict for layer in report.layers).most_common()
    return f"{plural(len(report.layers), 'layer')}: {', '.join(f'{count} {verdict}' for verdict, count in counts)}"


def layer_notes(layer: LayerRecord) -> str:
    """What else the quantizer reported: "dead_columns=3 condition=1.2e+06"; zero counts are left out."""
    return " ".join(f"{name}={text}" for name in layer.notes if (text := note_text(layer, name)))


def note_text(layer: LayerRecord, name: str) -> str:
    """One value that the quantizer reported; "" for a zero and for none."""
    value = layer.notes.get(name)
    if value in (0, False, None, ""):
        return ""
    return significant(value, 3) if isinstance(value, float) else str(value)


def layers_by_kind(layers: Iterable[LayerRecord]) -> dict[str, list[LayerRecord]]:
    return grouped(layers, lambda layer: layer.kind)


def stage_cost(stage: StageRecord) -> str:
    """ "12.3 s" or "reused"."""
    return "reused" if stage.reused else duration(stage.seconds)


def reused_stages(stages: Sequence[StageRecord]) -> str:
    """ "7 of 12"; "" for none."""
    count = sum(stage.reused for stage in stages)
    return f"{count} of {len(stages)}" if count else ""


def refinement(report: RunReport) -> Pairs:
    """What a refinement has changed; empty for a run without one."""
    record = report.refinement
    if record is None:
        return []
    first, *others = record.courses
    count = len(record.courses)
    before = sum(course.points[0].heldout_loss for course in record.courses) / count
    after = sum(min(point.heldout_loss for point in course.points) for course in record.courses) / count
    how = f" (mean of {count} blocks)" if others else f", step {first.best_step} of {first.steps} kept"
    return [(
        "refinement",
        f"{record.refinement}; loss of held-out windows {significant(before)} → {significant(after)}{how}; "
        f"{percent(record.codes_changed)} of the codes and {plural(report.audit.refined, 'gain')} of norms changed; "
        "E_y and E_w of layers are from before",
    )]  # fmt: skip


def exports(report: RunReport) -> Pairs:
    """Each packed checkpoint of a run."""
    return [(f"export {record.format}", export_line(record)) for record in report.exports]


def export_line(record: ExportRecord) -> str:
    """The size of a packed checkpoint and how exactly it holds the weights."""
    exact = f"within {significant(record.worst_error, 2)} steps" if record.worst_error else "exact"
    rounded = f"; {plural(len(record.rounded), 'other tensor')} rounded" if record.rounded else ""
    types = f" ({', '.join(f'{count} {kind}' for kind, count in record.types.items())})" if record.types else ""
    line = (
        f"{byte_size(record.weight_bytes)}{types}, {significant(record.bits_per_weight, 3)} bits per weight; "
        f"read back from its files: {exact}{rounded}"
    )
    if (found := record.check) is None:
        return f"{line}; not tried in an engine"
    kl, change = significant(found.kl_divergence, 2), relative_change(found.perplexity_change)
    return f"{line}; in {found.engine}: KL {kl}, perplexity {change} over {plural(found.windows, 'window')}"


def key_metrics(report: RunReport) -> list[KeyMetric]:
    """The metrics that a slide would show."""
    reused = reused_stages(report.stages)
    left_out = f"; {reused} stages were reused" if reused else ""
    details = {"seconds": f"of computed stages on {report.device}, without loading PyTorch{left_out}"}
    return [*quality_metrics(report), *_metrics(costs(report), details)]


def quality_metrics(report: RunReport) -> list[KeyMetric]:
    """How good and how large the quantised model is."""
    details = {
        "perplexity": f"original {perplexity_text(report.original)}",
        "packed_bytes": f"original {byte_size(report.audit.source_bytes)}",
    }
    return _metrics(figures(report), details | _task_details(report.tasks))


def evaluation_metrics(report: EvaluationReport) -> list[KeyMetric]:
    """The perplexity of one checkpoint and, if a reference was evaluated, its distance from that."""
    loss = plus_minus(report.perplexity.nll, report.perplexity.nll_standard_error)
    details = {
        "perplexity": f"negative log-likelihood {loss} nats per token",
        "kl": "nats per token, reference || model",
    }
    return _metrics(figures(report), details | _task_details(report.tasks))


def _metrics(found: Mapping[str, Figure], details: Mapping[str, str]) -> list[KeyMetric]:
    """details: where they say more than what kind of figure it is."""
    kinds = {name: kind_of(name) for name in [*KINDS, *found] if name in found}
    return [
        KeyMetric(kind.label, kind.text(found[name]), details.get(name, kind.detail))
        for name, kind in kinds.items()
        if kind.label
    ]


def _task_details(tasks: Iterable[TaskRecord]) -> dict[str, str]:
    return {task.name: _task_detail(task) for task in tasks}


def _task_detail(task: TaskRecord) -> str:
    original = ""
    if task.original is not None:
        original = f"original {plus_minus(task.original.value, task.original.standard_error or math.nan)}; "
    shots = f", {plural(task.fewshot, 'example')} before each" * bool(task.fewshot)
    return f"{original}{plural(task.samples, 'sample')}{shots}, {task.harness}"


def perplexity_text(perplexity: Perplexity) -> str:
    return plus_minus(perplexity.value, perplexity.standard_error)


def provenance(report: RunReport) -> Pairs:
    """What the result was made from."""
    return [
        ("recipe", report.recipe),
        ("model", f"{report.model} ({report.architecture}, {report.parameters / 1e6:,.1f} M parameters)"),
        ("model hash", report.model_hash),
        ("quantizer", report.quantizer),
        *basis(report),
        *refinement(report),
        ("calibration", report.calibration),
        ("protocol", report.protocol.line()),
        ("reload check", report.reload_check),
        ("tensor audit", audit_verdict(report)),
        *exports(report),
        ("layers", layer_verdicts(report)),
        ("device", report.device),
        ("versions", ", ".join(f"{name} {number}" for name, number in report.versions.items())),
    ]
