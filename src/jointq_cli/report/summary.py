"""What the report of one run says, in sentences and key metrics: the one source for the terminal, Markdown and HTML.

Knows the records and how to format their numbers. Knows no markup, no file and no terminal.
"""

import math
from collections.abc import Iterable
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
)
from jointq_cli.report import rotation_summary
from jointq_cli.report.grouping import grouped
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
)

FALLBACK = "fallback"
DAMPED = "damped"


def title(report: RunReport) -> str:
    """ "Llama-3.2-1B, GPTQ W4 g128": a local model by the name of its directory, a hub model by its id."""
    path = Path(report.model)
    local = path.is_absolute() or report.model.startswith(".")
    return f"{path.name if local else report.model}, {report.quantizer}"


def headline(report: RunReport) -> str:
    """The result in one line."""
    before, after = significant(report.original.value), significant(report.quantized.value)
    simulated = f" stored, {report.simulation.activations.split()[0]} simulated" if report.simulation else ""
    return (
        f"{significant(report.bits_per_weight, 3)} bits per weight{partly(report)}{simulated}; "
        f"perplexity {before} → {after} ({relative_change(perplexity_increase(report)[0])}), "
        f"KL {significant(report.comparison.kl_divergence, 3)} nats"
    )


def partly(report: RunReport) -> str:
    """What `bits_per_weight` leaves out, where that is much; "" otherwise."""
    found = report.coverage
    if found is None or found.is_complete:
        return ""
    return f" in {percent(found.share)} of the blocks' weights ({significant(found.block_bits, 3)} in all of them)"


def perplexity_increase(report: RunReport) -> tuple[float, float]:
    """Relative increase over the original (0.05 is five percent more), and its standard error.

    The standard error is that of the increase in negative log-likelihood, which is paired over windows.
    """
    ratio = report.quantized.value / report.original.value if report.original.value else math.nan
    return ratio - 1, ratio * report.comparison.nll_increase_standard_error


def perplexity_text(perplexity: Perplexity) -> str:
    return plus_minus(perplexity.value, perplexity.standard_error)


def kl_text(comparison: Comparison) -> str:
    return plus_minus(comparison.kl_divergence, comparison.kl_divergence_standard_error)


def explanation(report: RunReport) -> str:
    """The result in full sentences, for readers who do not see such metrics daily."""
    agreement = percent(report.comparison.top1_agreement)
    sentences = [
        f"{plural(len(report.layers), 'linear layer')} of {report.model} "
        f"({parameter_count(report.parameters)} parameters) were quantised with {report.quantizer}. "
        f"On the same {report.protocol.scored_tokens} tokens both models rank the same token first "
        f"in {agreement} of all positions."
    ]
    if within_noise(report):
        sentences.append("The change in perplexity is within two standard errors: too small for this text to show.")
    if report.audit.packed_bytes and report.audit.source_bytes:
        ratio = report.audit.source_bytes / report.audit.packed_bytes
        sentences.append(
            f"With its codes packed the model takes {byte_size(report.audit.packed_bytes)}, "
            f"{significant(ratio, 2)} times less than the original's "
            f"{byte_size(report.audit.source_bytes)}."
        )
    return " ".join(sentences)


def refined_gains(report: RunReport) -> str:
    """What else than the selected layers has changed, as the end of a sentence."""
    return f" but for {plural(report.audit.refined, 'gain')} of norms that were trained" if report.audit.refined else ""


def basis(report: RunReport) -> list[tuple[str, str]]:
    """Rotation and simulated activations of a run, as (label, value); empty for a run without them."""
    found = []
    if report.rotation is not None:
        found.append(("rotation", rotation_summary.headline(report.rotation)))
        found += rotation_summary.online(report.rotation)
    if report.simulation is not None:
        found.append(("simulated", f"{report.simulation.activations}; not in the checkpoint"))
    return found


def stored_and_simulated(report: RunReport) -> str:
    """Which part of the result is stored in the checkpoint, and which part was only simulated."""
    bits = f"{significant(report.bits_per_weight, 3)} bits{partly(report)}"
    stored = f"In the checkpoint: weights of {bits}, dequantised"
    if report.rotation is not None:
        stored += f", in a basis that is absorbed ({'; '.join(rotation_summary.names(report.rotation))})"
        if report.rotation.online:
            stored += f" but for {' and '.join(report.rotation.online)}, which must run online: transformers refuses it"
    if report.simulation is None:
        return f"{stored}. Nothing is simulated."
    return (
        f"{stored}. Simulated while the perplexity was measured, and not in the checkpoint: activations "
        f"{report.simulation.activations}."
    )


def within_noise(report: RunReport) -> bool:
    """Whether the increase in loss is below two standard errors of the paired difference."""
    comparison = report.comparison
    return abs(comparison.nll_increase) < 2 * comparison.nll_increase_standard_error


def problems(report: RunReport) -> list[str]:
    """Reasons not to use this checkpoint without a closer look, the worst first. Empty for a clean run."""
    found = []
    if not report.audit.passed:
        found.append(f"audit failed: {audit_verdict(report)}")
    found += perplexity_problems("the original model's perplexity", report.original, report.protocol)
    found += perplexity_problems("the quantised model's perplexity", report.quantized, report.protocol)
    fallbacks = [layer.name for layer in report.layers if layer.verdict == FALLBACK]
    if fallbacks:
        found.append(f"{plural(len(fallbacks), 'layer')} fell back to RTN: {listed(fallbacks)}")
    if report.rotation is not None:
        found += rotation_summary.problems(report.rotation)
    if report.reload_check != IDENTICAL:
        found.append(f"the checkpoint reloaded from disk differs from the model in memory: {report.reload_check}")
    found += report.failed_exports
    found += [problem for record in report.exports if record.check for problem in record.check.problems]
    return found + report.beyond_limits


def perplexity_problems(name: str, perplexity: Perplexity, protocol: Protocol) -> list[str]:
    if math.isfinite(perplexity.value):
        return []
    wider = "" if protocol.dtype == "float32" else "; try runtime.dtype=float32"
    return [f"{name} is {perplexity.value} in {protocol.dtype}{wider}"]


def audit_verdict(report: RunReport) -> str:
    """The audit in one line: counts, or the first names of the tensors that are wrong."""
    audit = report.audit
    wrong = [
        f"{len(names)} {what} ({listed(names)})"
        for what, names in (
            ("missing", audit.missing),
            ("unexpected", audit.unexpected),
            ("changed", audit.changed),
        )
        if names
    ]
    if wrong:
        return ", ".join(wrong)
    refined = f", {audit.refined} gains of norms refined" if audit.refined else ""
    return f"passed: {audit.quantized} tensors quantised{refined}, {audit.identical} identical to the source"


def layer_verdicts(report: RunReport) -> str:
    """ "210 layers: 208 ok, 1 damped, 1 fallback"."""
    verdicts = [layer.verdict for layer in report.layers]
    known = ("ok", DAMPED, FALLBACK)
    order = [*known, *sorted(set(verdicts) - set(known))]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in order if verdict in verdicts]
    return f"{plural(len(verdicts), 'layer')}: {', '.join(counts) or 'none'}"


def layer_notes(layer: LayerRecord) -> str:
    """What else the quantizer reported: "dead_columns=3 condition=1.2e+06"; zero counts are left out."""
    return " ".join(
        f"{name}={significant(value, 3) if isinstance(value, float) else value}"
        for name, value in layer.notes.items()
        if value not in (0, False, None, "")
    )


def stage_cost(stage: StageRecord) -> str:
    """ "12.3 s" or "reused"."""
    return "reused" if stage.reused else duration(stage.seconds)


def generation_note(report: RunReport) -> str:
    """How the generated texts were made."""
    note = "What each model writes after a prompt, by the most likely token each time"
    return f"{note}; activations are not quantised." if report.simulation else f"{note}."


def refinement(report: RunReport) -> list[tuple[str, str]]:
    """What a refinement has changed, as (label, value); empty for a run without one."""
    record = report.refinement
    if record is None:
        return []
    losses = [
        (course.points[0].heldout_loss, min(point.heldout_loss for point in course.points)) for course in record.courses
    ]
    before, after = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    of_blocks = "" if len(losses) == 1 else f" (mean of {plural(len(losses), 'block')})"
    kept = f", step {record.courses[0].best_step} of {record.courses[0].steps} kept" if len(losses) == 1 else ""
    gains = plural(report.audit.refined, "gain")
    changed = f"{percent(record.codes_changed)} of the codes and {gains} of norms changed"
    held_out = f"loss of held-out windows {significant(before)} → {significant(after)}{of_blocks}{kept}"
    before_it = "E_y and E_w of layers are from before"
    return [("refinement", f"{record.refinement}; {held_out}; {changed}; {before_it}")]


def exports(report: RunReport) -> list[tuple[str, str]]:
    """Each packed checkpoint of a run, as (label, value)."""
    return [(f"export {record.format}", export_line(record)) for record in report.exports]


def export_line(record: ExportRecord) -> str:
    """The size of a packed checkpoint and how exactly it holds the weights."""
    size, bits = byte_size(record.weight_bytes), significant(record.bits_per_weight, 3)
    exact = f"within {significant(record.worst_error, 2)} steps" if record.worst_error else "exact"
    rounded = f"; {plural(len(record.rounded), 'other tensor')} rounded" if record.rounded else ""
    types = f" ({', '.join(f'{count} {kind}' for kind, count in record.types.items())})" if record.types else ""
    line = f"{size}{types}, {bits} bits per weight; read back from its files: {exact}{rounded}"
    if record.check is None:
        return f"{line}; not tried in an engine"
    found = record.check
    change = relative_change(found.perplexity_change)
    kl = significant(found.kl_divergence, 2)
    return f"{line}; in {found.engine}: KL {kl}, perplexity {change} over {plural(found.windows, 'window')}"


def key_metrics(report: RunReport) -> list[KeyMetric]:
    """The metrics that a slide would show."""
    return [
        *quality_metrics(report),
        KeyMetric("time", duration(total_seconds(report)), f"on {report.device}"),
        KeyMetric("peak memory", byte_size(report.peak_memory), "resident set of the process"),
    ]


def quality_metrics(report: RunReport) -> list[KeyMetric]:
    """How good and how large the quantised model is."""
    audit = report.audit
    stored = "of the quantised layers: packed codes and all that they need"
    return [
        KeyMetric("perplexity", perplexity_text(report.quantized), f"original {perplexity_text(report.original)}"),
        *comparison_metrics(report.comparison),
        *task_metrics(report.tasks),
        KeyMetric("bits per weight", significant(report.bits_per_weight, 3), stored),
        *_coverage_metrics(report),
        KeyMetric("packed size", byte_size(audit.packed_bytes), f"original {byte_size(audit.source_bytes)}"),
    ]


def task_metrics(tasks: Iterable[TaskRecord]) -> list[KeyMetric]:
    """The figures of lm-eval's tasks, as it gives them: an accuracy of 62 % is 0.62."""
    return [KeyMetric(task.name, task_score_text(task.score), _task_detail(task)) for task in tasks]


def task_score_text(score: TaskScore | None) -> str:
    """ "0.620 ± 0.034"; "-" for none."""
    return MISSING if score is None else plus_minus(score.value, score.standard_error or 0.0)


def task_change_text(task: TaskRecord) -> str:
    """The change against the original, with the standard error of the paired difference: "-0.012 ± 0.009"."""
    if task.original is None:
        return MISSING
    change = task.score.value - task.original.value
    return ("+" if change > 0 else "") + plus_minus(change, task.change_standard_error or 0.0)


def _task_detail(task: TaskRecord) -> str:
    samples = plural(task.samples, "sample") + (
        f", {plural(task.fewshot, 'example')} before each" if task.fewshot else ""
    )
    before = f"original {task_score_text(task.original)}, change {task_change_text(task)}; " if task.original else ""
    return before + samples


def _coverage_metrics(report: RunReport) -> list[KeyMetric]:
    if report.coverage is None:
        return []
    share = f"of all weights of the blocks; {percent(report.coverage.share)} of them are quantised"
    return [
        KeyMetric("bits per block weight", significant(report.coverage.block_bits, 3), share),
        KeyMetric("bits per parameter", significant(report.coverage.checkpoint_bits, 3), "of the complete checkpoint"),
    ]


def comparison_metrics(comparison: Comparison, models: str = "original || quantised") -> list[KeyMetric]:
    """How far the quantised model's predictions are from the original's. models: the two, for the divergence."""
    ratio = math.exp(comparison.nll_increase)
    increase = relative_change(ratio - 1, ratio * comparison.nll_increase_standard_error)
    change = KeyMetric("perplexity increase", increase, "standard error of the paired difference")
    if math.isnan(comparison.kl_divergence):  # an engine that gives no logits
        return [change]
    return [
        change,
        KeyMetric("KL divergence", kl_text(comparison), f"nats per token, {models}"),
        KeyMetric("top-1 agreement", percent(comparison.top1_agreement), "both put the same token first"),
    ]


def evaluation_problems(report: EvaluationReport) -> list[str]:
    """Reasons not to use the result of `jointq evaluate`."""
    found = report.problems + perplexity_problems("the perplexity", report.perplexity, report.protocol)
    if report.comparison is not None and not math.isfinite(report.comparison.nll_increase):
        found += [f"the difference from the reference is {report.comparison.nll_increase}"] if not found else []
    return found


def evaluation_metrics(report: EvaluationReport) -> list[KeyMetric]:
    """The perplexity of one checkpoint and, if a reference was evaluated, its distance from that."""
    nll = plus_minus(report.perplexity.nll, report.perplexity.nll_standard_error)
    perplexity = perplexity_text(report.perplexity)
    metrics = [KeyMetric("perplexity", perplexity, f"negative log-likelihood {nll} nats per token")]
    compared = comparison_metrics(report.comparison, "reference || model") if report.comparison else []
    return metrics + compared + task_metrics(report.tasks)


def total_seconds(report: RunReport | EvaluationReport) -> float:
    """The time of this run, without the stages whose results were reused."""
    return sum(stage.seconds for stage in report.stages if not stage.reused)


def layers_by_kind(layers: Iterable[LayerRecord]) -> dict[str, list[LayerRecord]]:
    return grouped(layers, lambda layer: layer.kind)


def worst_layers(report: RunReport, count: int) -> list[LayerRecord]:
    """The layers with the largest output error; those whose error is not finite come first."""

    def error(layer: LayerRecord) -> float:
        return layer.output_error if math.isfinite(layer.output_error) else math.inf

    return sorted(report.layers, key=error, reverse=True)[:count]


def provenance(report: RunReport) -> list[tuple[str, str]]:
    """What the result was made from, as (label, value)."""
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
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
        ("versions", versions),
    ]
