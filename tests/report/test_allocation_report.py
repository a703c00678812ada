"""Tables and figures of a budget of bits."""

import re
from dataclasses import replace

import pytest

from jointq_cli.records import RunReport
from jointq_cli.records.allocation import AllocationPoint, AllocationRecord
from jointq_cli.report.figures.run import allocation_figures, run_figures
from jointq_cli.report.pages.run import run_markdown
from jointq_cli.report.tables.run import allocation_table


@pytest.fixture
def budgeted(report: RunReport) -> RunReport:
    layers = [
        replace(layer, label=f"W{layer.block % 2 + 3}", bits_per_weight=layer.block % 2 + 3.1)
        for layer in report.layers
    ]
    record = AllocationRecord(
        allocation="bits_per_weight=3.6 of {bits: 3}, {bits: 4}",
        chosen=AllocationPoint(3.59, 0.021),
        candidates=["{bits: 3}", "{bits: 4}"],
        uniform=[AllocationPoint(3.1, 0.05), AllocationPoint(4.1, 0.012)],
        curve=[AllocationPoint(3.1, 0.05), AllocationPoint(3.59, 0.021), AllocationPoint(4.1, 0.012)],
        other_tie=AllocationPoint(3.58, 0.023),
        layers={layer.name: layer.block % 2 for layer in layers},
    )
    return replace(report, layers=layers, allocation=record)


def test_the_table_has_both_losses(budgeted: RunReport) -> None:
    rows = allocation_table(budgeted).rows
    assert rows[0][:3] == ["as chosen", "3.590", "0.02100"]
    assert rows[0][3]
    assert [row[0] for row in rows[1:]] == [
        "{bits: 3} in all", "{bits: 4} in all", "chosen with the other allocation.tie"
    ]  # fmt: skip
    assert "## Budget: bits_per_weight=3.6 of" in run_markdown(budgeted)


def test_figures_have_the_bits_of_every_layer_and_the_curve(budgeted: RunReport) -> None:
    assert budgeted.allocation is not None
    depth, curve = allocation_figures(budgeted, budgeted.allocation)
    for bits in {layer.bits_per_weight for layer in budgeted.layers}:
        assert f">{bits:.3g}<" in depth.svg
    assert {"least predicted", "one form in all layers", "measured", "chosen"} <= set(
        re.findall(r">([^<>]+)</text>", curve.svg)
    )


def test_nothing_without_a_budget(report: RunReport) -> None:
    assert allocation_table(report).rows == []
    assert not [figure for figure in run_figures(report) if figure.title in ("Bits over depth", "Loss over size")]
