"""What the report of one run says, in sentences and key metrics: the one source for the terminal, Markdown and HTML."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from jointq_cli.records import (
    IDENTICAL,
    Comparison,
    EvaluationReport,
    ExportRecord,
    LayerRecord,
    Perplexity,
    Protocol,
    RunReport,
    StageRecord,
    TaskRecord,
    TaskScore,
)  # fmt: skip
from jointq_cli.report import rotation_summary
from jointq_cli.report.grouping import grouped
from jointq_cli.report.measured import KINDS, Figure, costs, figures
from jointq_cli.report.number_format import (
    MISSING,
    KeyMetric,
    byte_size,
    duration,
    listed,
    parameter_count,
    percent,
    plural,
    plus_minus,
    relative_change,
    significant,
)  # fmt: skip

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
    simulated = f" stored, {report.simulation.activations.split()[0]} simulated" if report.simulation else ""
    return (
        f"{significant(report.bits_per_weight, 3)} bits per weight{partly(report)}{simulated}; "
        f"perplexity {before} → {after} ({increase}), KL {significant(report.comparison.kl_divergence, 3)} nats"
    )


def partly(report: RunReport) -> str:
    """What `bits_per_weight` leaves out, where that is much; "" otherwise."""
    found = report.coverage
    if found is None or found.is_complete:
        return ""
    return f" in {percent(found.share)} of the blocks' weights ({significant(found.block_bits, 3)} in all of them)"


def perplexity_text(perplexity: Perplexity) -> str:
    return plus_minus(perplexity.value, perplexity.standard_error)


def kl_text(comparison: Comparison) -> str:
    return plus_minus(comparison.kl_divergence, comparison.kl_divergence_standard_error)


def explanation(report: RunReport) -> str:
    """The result in full sentences, for readers who do not see such metrics daily."""
    found, audit = report.comparison, report.audit
    count = len(report.layers)
    text = (
        f"{plural(count, 'linear layer')} of {report.model} ({parameter_count(report.parameters)} parameters) "
        f"{'was' if count == 1 else 'were'} quantised with {report.quantizer}. On the same "
        f"{plural(report.protocol.scored_tokens, 'token')} both models rank the same token first in "
        f"{percent(found.top1_agreement)} of all positions."
    )
    if abs(found.nll_increase) < 2 * found.nll_increase_standard_error:
        text += " The change in perplexity is within two standard errors: too small for this text to show."
    if audit.packed_bytes and audit.source_bytes:
        text += (
            f" With its codes packed the model takes {byte_size(audit.packed_bytes)}, "
            f"{significant(audit.source_bytes / audit.packed_bytes, 2)} times less than the original's "
            f"{byte_size(audit.source_bytes)}."
        )
    return text


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


def stored_and_simulated(report: RunReport) -> str:
    """Which part of the result is stored in the checkpoint, and which part was only simulated."""
    text = f"In the checkpoint: weights of {significant(report.bits_per_weight, 3)} bits{partly(report)}, dequantised"
    if report.rotation is not None:
        text += f", in a basis that is absorbed ({'; '.join(rotation_summary.names(report.rotation))})"
        if report.rotation.online:
            text += f" but for {' and '.join(report.rotation.online)}, which must run online: transformers refuses it"
    if report.simulation is None:
        return f"{text}. Nothing is simulated."
    simulated = f"activations {report.simulation.activations}"
    return f"{text}. Simulated while the perplexity was measured, and not in the checkpoint: {simulated}."


def problems(report: RunReport) -> list[str]:
    """Reasons not to use this checkpoint without a closer look, the worst first. Empty for a clean run."""
    found = [] if report.audit.passed else [f"audit failed: {audit_verdict(report)}"]
    found += perplexity_problems("the original model's perplexity", report.original, report.protocol)
    found += perplexity_problems("the quantised model's perplexity", report.quantized, report.protocol)
    if fallbacks := [layer.name for layer in report.layers if layer.verdict == FALLBACK]:
        found.append(f"{plural(len(fallbacks), 'layer')} fell back to RTN: {listed(fallbacks)}")
    found += rotation_summary.problems(report.rotation) if report.rotation else []
    if report.reload_check != IDENTICAL:
        found.append(f"the checkpoint reloaded from disk differs from the model in memory: {report.reload_check}")
    exports = [problem for record in report.exports if record.check for problem in record.check.problems]
    return found + report.failed_exports + exports + report.beyond_limits


def perplexity_problems(name: str, perplexity: Perplexity, protocol: Protocol) -> list[str]:
    if math.isfinite(perplexity.value):
        return []
    wider = "" if protocol.dtype == "float32" else "; try runtime.dtype=float32"
    return [f"{name} is {perplexity.value} in {protocol.dtype}{wider}"]


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
    verdicts = [layer.verdict for layer in report.layers]
    known = ("ok", DAMPED, FALLBACK)
    order = [*known, *sorted(set(verdicts) - set(known))]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in order if verdict in verdicts]
    return f"{plural(len(verdicts), 'layer')}: {', '.join(counts) or 'none'}"


def layer_notes(layer: LayerRecord) -> str:
    """What else the quantizer reported: "dead_columns=3 condition=1.2e+06"; zero counts are left out."""
    return " ".join(f"{name}={text}" for name in layer.notes if (text := note_text(layer, name)))


def note_text(layer: LayerRecord, name: str) -> str:
    """One value that the quantizer reported; "" for a zero and for none."""
    value = layer.notes.get(name)
    if value in (0, False, None, ""):
        return ""
    return significant(value, 3) if isinstance(value, float) else str(value)


def stage_cost(stage: StageRecord) -> str:
    """ "12.3 s" or "reused"."""
    return "reused" if stage.reused else duration(stage.seconds)


def refinement(report: RunReport) -> Pairs:
    """What a refinement has changed; empty for a run without one."""
    record = report.refinement
    if record is None:
        return []
    courses = record.courses
    losses = [(course.points[0].heldout_loss, min(point.heldout_loss for point in course.points)) for course in courses]
    before, after = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    one = len(courses) == 1
    how = f", step {courses[0].best_step} of {courses[0].steps} kept" if one else f" (mean of {len(courses)} blocks)"
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
    details = {"seconds": f"of computed stages on {report.device}, without loading PyTorch"}
    return [*quality_metrics(report), *_metrics(costs(report), details)]


def quality_metrics(report: RunReport) -> list[KeyMetric]:
    """How good and how large the quantised model is."""
    share = f", of which {percent(report.coverage.share)} are quantised" if report.coverage else ""
    details = {
        "perplexity": f"original {perplexity_text(report.original)}",
        "bits_per_block_weight": f"per weight of the blocks{share}",
        "packed_bytes": f"original {byte_size(report.audit.source_bytes)}",
    }
    return [*_metrics(figures(report), details), *task_metrics(report.tasks)]


def evaluation_metrics(report: EvaluationReport) -> list[KeyMetric]:
    """The perplexity of one checkpoint and, if a reference was evaluated, its distance from that."""
    nll = plus_minus(report.perplexity.nll, report.perplexity.nll_standard_error)
    details = {
        "perplexity": f"negative log-likelihood {nll} nats per token",
        "kl": "nats per token, reference || model",
    }
    return [*_metrics(figures(report), details), *task_metrics(report.tasks)]


def _metrics(found: Mapping[str, Figure], details: Mapping[str, str]) -> list[KeyMetric]:
    """details: where they say more than what kind of figure it is."""
    return [
        KeyMetric(kind.label, kind.text(found[name]), details.get(name, kind.detail))
        for name, kind in KINDS.items()
        if name in found
    ]


def task_metrics(tasks: Iterable[TaskRecord]) -> list[KeyMetric]:
    """The figures of lm-eval's tasks, as it gives them: an accuracy of 62 % is 0.62."""
    return [KeyMetric(task.name, task_score_text(task.score), _task_detail(task)) for task in tasks]


def task_score_text(score: TaskScore | None) -> str:
    """ "0.620 ± 0.034"; "-" for none."""
    return MISSING if score is None else plus_minus(score.value, score.standard_error or 0.0)


def task_change_text(task: TaskRecord | None) -> str:
    """The change against the original, with the standard error of the paired difference: "-0.012 ± 0.009"."""
    if task is None or task.original is None:
        return MISSING
    change = task.score.value - task.original.value
    return ("+" if change > 0 else "") + plus_minus(change, task.change_standard_error or 0.0)


def _task_detail(task: TaskRecord) -> str:
    before = f"original {task_score_text(task.original)}, change {task_change_text(task)}; " if task.original else ""
    examples = f", {plural(task.fewshot, 'example')} before each" if task.fewshot else ""
    return f"{before}{plural(task.samples, 'sample')}{examples}"


def evaluation_problems(report: EvaluationReport) -> list[str]:
    """Reasons not to use the result of `jointq evaluate`."""
    found = report.problems + perplexity_problems("the perplexity", report.perplexity, report.protocol)
    if report.comparison is not None and not math.isfinite(report.comparison.nll_increase):
        found += [f"the difference from the reference is {report.comparison.nll_increase}"] if not found else []
    return found


def layers_by_kind(layers: Iterable[LayerRecord]) -> dict[str, list[LayerRecord]]:
    return grouped(layers, lambda layer: layer.kind)


def provenance(report: RunReport) -> Pairs:
    """What the result was made from."""
    return [
        ("recipe", report.recipe),
        ("model", f"{report.model} ({report.architecture}, {parameter_count(report.parameters)} parameters)"),
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
