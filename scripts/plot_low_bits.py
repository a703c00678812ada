#!/usr/bin/env python
"""Draws docs/low_bits.svg from docs/low_bits.csv: error, KL divergence and perplexity over bits per weight.

    python scripts/plot_low_bits.py

A row of the table is one measurement; docs/low_bits.md, docs/allocation.md and docs/quality.md have the commands and
the standard errors. The file has the same bytes wherever it is drawn with the matplotlib of constraints.txt.
"""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

DOCS = Path(__file__).resolve().parents[1] / "docs"
PANELS = (
    (("error", "layer 512 x 512"), ("error", "layers of SmolLM2")),
    (("KL", "bundled model"), ("KL", "SmolLM2-135M-Instruct")),
    (("perplexity", "bundled model"), ("perplexity", "SmolLM2-135M-Instruct")),
)
AXES = {"error": "held-out relative error", "KL": "KL divergence, nats", "perplexity": "perplexity"}
SERIES = {  # marker, colour
    "OneComp": ("x", "#777777"),
    "cq, arb, onebit": ("v", "#b8860b"),
    "quip": ("D", "#8b5a9f"),
    "JointQ": ("o", "#1f5fa8"),
    "JointQ half": ("s", "#58a0dc"),
    "JointQ incoherent": ("^", "#0f8554"),
    "dbf": ("P", "#c0392b"),
    "budget": ("*", "#e07b00"),
}
JOINED = ("JointQ", "JointQ half", "JointQ incoherent", "dbf", "budget")  # whose points are of one method


def draw(axes: Axes, rows: Iterable[Mapping[str, str]], measure: str, model: str) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (row["measure"], row["model"]) == (measure, model):
            found.setdefault(row["series"], []).append((float(row["bits"]), float(row["value"])))
    for series in filter(found.get, SERIES):
        marker, colour = SERIES[series]
        bits, values = zip(*sorted(found[series]), strict=True)
        line = "-" if series in JOINED and measure != "error" else "none"
        axes.plot(bits, values, marker=marker, color=colour, linestyle=line, linewidth=0.8, markersize=5)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(model, fontsize=9)
    axes.set_ylabel(AXES[measure], fontsize=8)
    axes.set_xlabel("bits per weight, all counted", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, linewidth=0.3)


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "low_bits", "svg.fonttype": "none"})
    with (DOCS / "low_bits.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 9), layout="constrained")
    for line, places in zip(PANELS, figure.subplots(3, 2), strict=True):
        for (measure, model), axes in zip(line, places, strict=True):
            draw(axes, rows, measure, model)
    legend = [
        Line2D([], [], marker=marker, color=colour, linestyle="none", markersize=5)
        for marker, colour in SERIES.values()
    ]
    figure.legend(legend, list(SERIES), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(DOCS / "low_bits.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
