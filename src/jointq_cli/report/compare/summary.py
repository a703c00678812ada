"""What a report says, in words and key figures: the one source for the terminal, the Markdown and the HTML.

Knows the records and how to put their numbers. Knows no markup, no file and no terminal.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jointq_cli.records import IDENTICAL, Comparison, EvaluationReport, LayerRecord, RunReport
from jointq_cli.report import number_format as units
from jointq_cli.report.compare import rotation_summary
from jointq_cli.report.number_format import KeyFigure

FALLBACK = "fallback"
DAMPED = "damped"


@dataclass(frozen=True)
class KindSummary:
    """All layers of one kind, such as q_proj."""

    kind: str
    layers: int
    median_output_error: float
    largest_output_error: float
    median_weight_error: float
    seconds: float


def title(report: RunReport) -> str:
    """ "Llama-3.2-1B, GPTQ W4 g128": a local model by its directory's name, a hub model by its id."""
    path = Path(report.model)
    local = path.is_absolute() or report.model.startswith(".")
    return f"{path.name if local else report.model}, {report.quantizer}"


def headline(report: RunReport) -> str:
    """The verdict in one line."""
    before, after = units.significant(report.original.value), units.significant(report.quantized.value)
    simulated = f" stored, {report.simulation.activations.split()[0]} simulated" if report.simulation else ""
    return (
        f"{units.significant(report.bits_per_weight, 3)} bits per weight{simulated}; "
        f"perplexity {before} → {after} ({units.change(perplexity_increase(report))}), "
        f"KL {units.significant(report.comparison.kl_divergence, 3)} nats"
    )


def perplexity_increase(report: RunReport) -> float:
    """Relative: 0.05 is five percent more than the original."""
    return report.quantized.value / report.original.value - 1 if report.original.value else math.nan


def perplexity_increase_error(report: RunReport) -> float:
    """Standard error of `perplexity_increase`, from the nll increase, which is paired over windows."""
    return (1 + perplexity_increase(report)) * report.comparison.nll_increase_standard_error


def explanation(report: RunReport) -> str:
    """The verdict in full sentences, for people who do not read such figures daily."""
    agreement = units.percent(report.comparison.top1_agreement)
    sentences = [
        f"{units.plural(len(report.layers), 'linear layer')} of {report.model} "
        f"({units.parameters(report.parameters)} parameters) were quantised with {report.quantizer}. "
        f"On the same {report.protocol.scored_tokens} tokens both models rank the same token first "
        f"in {agreement} of all positions."
    ]
    if within_noise(report):
        sentences.append("The change in perplexity is within two standard errors: too small for this text to show.")
    if report.audit.packed_bytes and report.audit.source_bytes:
        ratio = report.audit.source_bytes / report.audit.packed_bytes
        sentences.append(
            f"With its codes packed the model takes {units.size(report.audit.packed_bytes)}, "
            f"{units.significant(ratio, 2)} times less than the original's "
            f"{units.size(report.audit.source_bytes)}."
        )
    return " ".join(sentences)


def basis(report: RunReport) -> list[tuple[str, str]]:
    """Rotation and simulation of a run, where there are any."""
    found = []
    if report.rotation is not None:
        found.append(("rotation", rotation_summary.headline(report.rotation)))
        found += rotation_summary.online(report.rotation)
    if report.simulation is not None:
        found.append(("simulated", f"{report.simulation.activations}; not in the checkpoint"))
    return found


def stored_and_simulated(report: RunReport) -> str:
    """What of the result is in the checkpoint, and what only in the figures."""
    stored = f"In the checkpoint: weights of {units.significant(report.bits_per_weight, 3)} bits, dequantised"
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
    """Whether the loss is below two standard errors of the paired difference."""
    comparison = report.comparison
    return abs(comparison.nll_increase) < 2 * comparison.nll_increase_standard_error


def problems(report: RunReport) -> list[str]:
    """Everything that speaks against using this checkpoint unread, the worst first. Empty for a clean run."""
    found = []
    if not report.audit.passed:
        found.append(f"audit failed: {audit_verdict(report)}")
    if not math.isfinite(report.quantized.value):
        found.append(f"the quantised model's perplexity is {report.quantized.value}")
    fallbacks = [layer.name for layer in report.layers if layer.verdict == FALLBACK]
    if fallbacks:
        found.append(f"{units.plural(len(fallbacks), 'layer')} fell back to RTN: {units.listed(fallbacks)}")
    if report.rotation is not None:
        found += rotation_summary.problems(report.rotation)
    if report.reload_check != IDENTICAL:
        found.append(f"the checkpoint reloaded from disk differs from the model in memory: {report.reload_check}")
    return found


def audit_verdict(report: RunReport) -> str:
    """The audit in one line: counts, and the first names of what is wrong."""
    audit = report.audit
    wrong = [
        f"{len(names)} {what} ({units.listed(names)})"
        for what, names in (
            ("missing", audit.missing),
            ("unexpected", audit.unexpected),
            ("changed", audit.changed),
        )
        if names
    ]
    if wrong:
        return ", ".join(wrong)
    return f"passed: {audit.quantized} tensors quantised, {audit.identical} identical to the source"


def layer_verdicts(report: RunReport) -> str:
    """ "210 layers: 208 ok, 1 damped, 1 fallback"."""
    verdicts = [layer.verdict for layer in report.layers]
    known = ("ok", DAMPED, FALLBACK)
    order = [*known, *sorted(set(verdicts) - set(known))]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in order if verdict in verdicts]
    return f"{units.plural(len(verdicts), 'layer')}: {', '.join(counts) or 'none'}"


def key_figures(report: RunReport) -> list[KeyFigure]:
    """The figures a slide would show."""
    audit = report.audit
    original = units.plus_minus(report.original.value, report.original.standard_error)
    return [
        KeyFigure(
            "perplexity",
            units.plus_minus(report.quantized.value, report.quantized.standard_error),
            f"original {original}",
        ),
        *comparison_figures(report.comparison),
        KeyFigure(
            "bits per weight",
            units.significant(report.bits_per_weight, 3),
            "codes, scales, zero-points, permutation",
        ),
        KeyFigure("packed size", units.size(audit.packed_bytes), f"original {units.size(audit.source_bytes)}"),
        KeyFigure("time", units.duration(total_seconds(report)), f"on {report.device}"),
        KeyFigure("peak memory", units.size(report.peak_memory), "resident set of the process"),
    ]


def comparison_figures(comparison: Comparison) -> list[KeyFigure]:
    """What became of the original's predictions."""
    ratio = math.exp(comparison.nll_increase)
    increase = units.change(ratio - 1, ratio * comparison.nll_increase_standard_error)
    return [
        KeyFigure("perplexity increase", increase, "standard error of the paired difference"),
        KeyFigure(
            "KL divergence",
            units.plus_minus(comparison.kl_divergence, comparison.kl_divergence_standard_error),
            "nats per token, original || quantised",
        ),
        KeyFigure("top-1 agreement", units.percent(comparison.top1_agreement), "both put the same token first"),
    ]


def measured_figures(report: EvaluationReport) -> list[KeyFigure]:
    """The figures of one checkpoint, and with a reference its distance from that."""
    value = units.plus_minus(report.perplexity.value, report.perplexity.standard_error)
    nll = units.plus_minus(report.perplexity.nll, report.perplexity.nll_standard_error)
    figures = [KeyFigure("perplexity", value, f"negative log-likelihood {nll} nats per token")]
    return figures + (comparison_figures(report.comparison) if report.comparison else [])


def total_seconds(report: RunReport | EvaluationReport) -> float:
    """What this run took; reused stages cost nothing."""
    return sum(stage.seconds for stage in report.stages if not stage.reused)


def kind_summaries(layers: Iterable[LayerRecord]) -> list[KindSummary]:
    """One row per kind of layer, in the order in which the model names them."""
    by_kind: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        by_kind.setdefault(layer.kind, []).append(layer)
    return [
        KindSummary(
            kind=kind,
            layers=len(members),
            median_output_error=statistics.median(layer.output_error for layer in members),
            largest_output_error=max(layer.output_error for layer in members),
            median_weight_error=statistics.median(layer.weight_error for layer in members),
            seconds=sum(layer.seconds for layer in members),
        )
        for kind, members in by_kind.items()
    ]


def worst_layers(report: RunReport, count: int) -> list[LayerRecord]:
    """The layers of largest output error, those that are not numbers first."""
    return sorted(report.layers, key=_badness, reverse=True)[:count]


def provenance(report: RunReport) -> list[tuple[str, str]]:
    """Where everything came from, as (what, value)."""
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return [
        ("recipe", report.recipe),
        (
            "model",
            f"{report.model} ({report.architecture}, {units.parameters(report.parameters)} parameters)",
        ),
        ("model hash", report.model_hash),
        ("quantizer", report.quantizer),
        *basis(report),
        ("calibration", report.calibration),
        ("protocol", report.protocol.line()),
        ("reload check", report.reload_check),
        ("tensor audit", audit_verdict(report)),
        ("layers", layer_verdicts(report)),
        ("device", report.device),
        ("versions", versions),
    ]


def _badness(layer: LayerRecord) -> float:
    return layer.output_error if math.isfinite(layer.output_error) else math.inf
