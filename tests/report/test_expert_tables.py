"""Tokens per expert: the table and the warning."""

from dataclasses import replace

from jointq_cli.records import RunReport
from jointq_cli.report.pages.run import run_markdown
from jointq_cli.report.tables.run import experts_table, few_tokens

TOKENS = {0: 900, 1: 0, 2: 40, 3: 500}


def with_experts(report: RunReport) -> RunReport:
    gate, down = (next(layer for layer in report.layers if layer.kind == kind) for kind in ("gate_proj", "down_proj"))
    layers = [
        replace(layer, name=f"model.layers.0.mlp.experts.{number}.{layer.kind}", tokens=tokens)
        for number, tokens in TOKENS.items()
        for layer in (gate, down)
    ]
    return replace(report, layers=[*report.layers, *layers])


def test_a_row_sums_up_the_experts_of_a_block(report: RunReport) -> None:
    table = experts_table(with_experts(report).layers)
    [row] = table.rows
    shown = "model.layers.0.mlp.experts 4 0 270 900 1 1 (0), 2 (40), 3 (500)"
    assert " ".join(row) == shown
    assert "## Calibration tokens per expert" in run_markdown(with_experts(report))


def test_experts_with_few_tokens_are_named(report: RunReport) -> None:
    layers = with_experts(report).layers
    assert few_tokens(layers, 41) == [
        "experts.warn_below=41: 2 of 4 experts have received fewer calibration tokens (model.layers.0.mlp.experts.1, "
        "model.layers.0.mlp.experts.2); raise calibration.num_samples"
    ]
    assert few_tokens(layers, 0) == []


def test_a_model_without_experts_has_neither(report: RunReport) -> None:
    assert experts_table(report.layers).rows == []
    assert few_tokens(report.layers, 1000) == []
    assert "per expert" not in run_markdown(report)
