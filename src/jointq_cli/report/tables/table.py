"""Several runs side by side as tables of text: the one source for the terminal, the Markdown and the HTML.

Knows what is said of runs that are compared and in which order. Knows no markup, no file and no terminal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jointq_cli.records import RunReport
from jointq_cli.report import number_format as units
from jointq_cli.report.compare import runs as side_by_side
from jointq_cli.report.compare import summary
from jointq_cli.report.compare.runs import Difference, ErrorRow, Run
from jointq_cli.report.console.lines import stage_cost

QUANTIZE = "quantize"  # the stage that does the work
CHANGED = 10  # layers
BEST = " *"
GAP = 2  # blanks between columns
MISSING = "-"
FACTOR_WIDTH = 9  # with the gap before it
MOST_CELL_WIDTH = 40  # where the width is limited
MOST_LABEL_WIDTH = 48


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False  # of its column


@dataclass(frozen=True)
class TextTable:
    """A table. Its first `stub` columns say what a row is about, and begin every part of it where it is folded."""

    title: str
    stub: int
    heading: list[str]
    rows: list[list[Cell]]
    remark: str = ""
    stub_is_known: bool = False  # told in a table before: where there is no room, its first column is enough

    def folded(self, width: int) -> list["TextTable"]:
        """The same in parts that are at most `width` columns wide; long cells lose their beginnings."""
        grid = self._clipped(min(MOST_CELL_WIDTH, (width - GAP) // 2))
        widths = grid.widths()
        if sum(widths[: grid.stub]) + GAP * grid.stub <= width // 2:
            return [grid._part(grid.stub, columns) for columns in _packed(widths, grid.stub, grid.stub, width)]
        first = grid.stub if grid.stub_is_known else 1
        return [grid._part(1, columns) for columns in _packed(widths, 1, first, width)]

    def widths(self) -> list[int]:
        """Of each column, in characters."""
        columns = zip(self.heading, *([cell.text for cell in row] for row in self.rows), strict=True)
        return [max(map(len, column)) for column in columns]

    def _part(self, stub: int, columns: Sequence[int]) -> "TextTable":
        chosen = [*range(stub), *columns]
        rows = [[row[column] for column in chosen] for row in self.rows]
        return replace(self, stub=stub, heading=[self.heading[column] for column in chosen], rows=rows)

    def _clipped(self, width: int) -> "TextTable":
        rows = [[replace(cell, text=units.shortened(cell.text, width)) for cell in row] for row in self.rows]
        return replace(self, heading=[units.shortened(text, width) for text in self.heading], rows=rows)


@dataclass(frozen=True)
class Sheet:
    """Everything that is told of several runs."""

    title: str
    headline: str
    warnings: list[str]  # why the runs do not compare
    notes: list[str]
    grids: list[TextTable]

    def as_text(self) -> list[str]:
        """Lines for a pipe: a row per run however wide, so that one can be found and cut."""
        warnings = [f"[warning] {warning}" for warning in self.warnings]
        grids = [line for grid in self.grids for line in ["", *grid_lines(grid)]]
        return [self.headline, *warnings, *grids, *([""] if self.notes else []), *self.notes]


def grid_lines(grid: TextTable) -> list[str]:
    """Title, heading, a line per row, and the remark."""
    widths = grid.widths()
    rows = [grid.heading, *([cell.text for cell in row] for row in grid.rows)]
    lines = [
        (" " * GAP)
        .join(
            f"{text:<{width}}" if column < grid.stub else f"{text:>{width}}"
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in rows
    ]
    return [grid.title, *lines, *([grid.remark] if grid.remark else [])]


def make_sheet(runs: Sequence[Run], unfinished: Sequence[str]) -> Sheet:
    """unfinished: the runs that were left out, as paths."""
    differences = side_by_side.setting_differences(runs)
    obstacles = side_by_side.obstacles(runs)
    return Sheet(
        title=f"{units.plural(len(runs), 'run')} of {' and '.join(dict.fromkeys(run.report.model for run in runs))}",
        headline="These runs do not compare: they were not measured alike." if obstacles else _headline(runs),
        warnings=[_told(obstacle, runs) for obstacle in obstacles],
        notes=_notes(runs, unfinished, differences),
        grids=[_figures(runs, differences), *_errors(runs, differences), *_changed(runs)],
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """Each run by its name and what sets it apart: "2 (quantizer=rtn, bits=3)", cut where it gets long."""
    differences = side_by_side.setting_differences(runs)
    heads = tails([difference.key for difference in differences])
    pairs = [
        [f"{head}={_value(difference.values[index])}" for head, difference in zip(heads, differences, strict=True)]
        for index in range(len(runs))
    ]
    return [
        _cut(f"{run.name} ({', '.join(settings)})" if settings else run.name)
        for run, settings in zip(runs, pairs, strict=True)
    ]


def _headline(runs: Sequence[Run]) -> str:
    told = [
        f"Least {what} in {_runs(best, labels(runs))}: {text(runs[min(best)].report)}."
        for what, figure, text in (("KL divergence", _kl, _kl_text), ("perplexity", _perplexity, _perplexity_text))
        if (best := side_by_side.best(runs, figure))
    ]
    return " ".join(told) or f"{units.plural(len(runs), 'run')}, of which none is best."


def _runs(best: set[int], named: Sequence[str]) -> str:
    return " and ".join(f"run {named[index]}" for index in sorted(best))


def _notes(runs: Sequence[Run], unfinished: Sequence[str], differences: Sequence[Difference]) -> list[str]:
    keys = ", ".join(difference.key for difference in differences)
    marked = side_by_side.best(runs, _kl) | side_by_side.best(runs, _perplexity)
    last_blocks = Difference(
        "last block", [str(run.report.blocks[-1].block) if run.report.blocks else None for run in runs]
    )
    return [
        f"settings that differ: {keys or 'none'}",
        *(["* the least of the runs that were measured alike"] if marked else []),
        *([f"not finished and left out: {', '.join(unfinished)}"] if unfinished else []),
        *_calibration_note(runs),
        *([_told(last_blocks, runs)] if len(set(last_blocks.values)) > 1 else []),
        *(
            f"only {_names(runs, indices)}: {units.plural(len(layers), 'layer')}, {units.listed(layers)}"
            for indices, layers in side_by_side.partial_layers(runs).items()
        ),
    ]


def _calibration_note(runs: Sequence[Run]) -> list[str]:
    if len({run.report.calibration for run in runs}) == 1:
        return []
    return ["calibration differs: the errors of layers and blocks were measured on different inputs"]


def _figures(runs: Sequence[Run], differences: Sequence[Difference]) -> TextTable:
    columns: list[tuple[str, list[Cell]]] = [
        ("perplexity", _marked(runs, _perplexity, _perplexity_text)),
        ("increase", _column(runs, _increase)),
        ("KL divergence", _marked(runs, _kl, _kl_text)),
        ("top-1", _column(runs, lambda report: units.percent(report.comparison.top1_agreement))),
        ("bits/weight", _column(runs, lambda report: units.significant(report.bits_per_weight, 3))),
        ("original", _column(runs, _original)),
        (QUANTIZE, _column(runs, _quantize_cost)),
        ("in all", _column(runs, lambda report: units.duration(summary.total_seconds(report)))),
        ("peak memory", _column(runs, lambda report: units.size(report.peak_memory))),
    ]
    return _grid_of_runs("Perplexity, KL divergence and costs", runs, differences, columns)


def _errors(runs: Sequence[Run], differences: Sequence[Difference]) -> list[TextTable]:
    accumulated = ErrorRow("last block", [side_by_side.accumulated_error(run.report) for run in runs])
    columns = [(row.name, _error_cells(row)) for row in [*side_by_side.kind_errors(runs), accumulated]]
    title = (
        f"E_y by kind of layer and accumulated error of the last block, and how many times that of run {runs[0].name}"
    )
    remark = f"medians over {units.plural(len(side_by_side.common_layers(runs)), 'layer')} that all runs have"
    return [replace(_grid_of_runs(title, runs, differences, columns), remark=remark, stub_is_known=True)]


def _changed(runs: Sequence[Run]) -> list[TextTable]:
    changed = side_by_side.changed_layers(runs, CHANGED)
    reference, *others = [run.name for run in runs]
    title = f"Layers whose E_y changed most against run {reference}, and how many times as large it is elsewhere"
    rows = [[Cell(row.name), Cell(units.relative_error(row.errors[0])), *map(Cell, _factors(row))] for row in changed]
    return [TextTable(title, 1, ["layer", f"E_y of {reference}", *others], rows)] if changed else []


def _grid_of_runs(
    title: str,
    runs: Sequence[Run],
    differences: Sequence[Difference],
    columns: Sequence[tuple[str, list[Cell]]],
) -> TextTable:
    """A row per run: its name, the settings in which it differs, and `columns`, as (heading, cells)."""
    heading = ["run", *tails([difference.key for difference in differences]), *(head for head, _ in columns)]
    rows = [
        [
            Cell(run.name),
            *(Cell(_value(difference.values[index])) for difference in differences),
            *(cells[index] for _, cells in columns),
        ]
        for index, run in enumerate(runs)
    ]
    return TextTable(title, 1 + len(differences), heading, rows)


def _column(runs: Sequence[Run], text: Callable[[RunReport], str]) -> list[Cell]:
    return [Cell(text(run.report)) for run in runs]


def _marked(runs: Sequence[Run], figure: Callable[[RunReport], float], text: Callable[[RunReport], str]) -> list[Cell]:
    best = side_by_side.best(runs, figure)
    # Blanks as wide as the mark keep the digits under each other.
    blank = " " * len(BEST) if best else ""
    return [
        Cell(f"{text(run.report)}{BEST if index in best else blank}", index in best) for index, run in enumerate(runs)
    ]


def _error_cells(row: ErrorRow) -> list[Cell]:
    """The reference's error, and every other with its ratio to that."""
    shown = ["", *_factors(row)]
    return [
        Cell(f"{units.relative_error(error)}{factor:>{FACTOR_WIDTH}}")
        for error, factor in zip(row.errors, shown, strict=True)
    ]


def _factors(row: ErrorRow) -> list[str]:
    """Every error but the reference's as its multiple."""
    return [units.factor(side_by_side.ratio(error, row.errors[0])) for error in row.errors[1:]]


def _perplexity(report: RunReport) -> float:
    return report.quantized.value


def _perplexity_text(report: RunReport) -> str:
    return units.plus_minus(report.quantized.value, report.quantized.standard_error)


def _original(report: RunReport) -> str:
    return units.plus_minus(report.original.value, report.original.standard_error)


def _increase(report: RunReport) -> str:
    return units.change(summary.perplexity_increase(report), summary.perplexity_increase_error(report))


def _kl(report: RunReport) -> float:
    return report.comparison.kl_divergence


def _kl_text(report: RunReport) -> str:
    return units.plus_minus(report.comparison.kl_divergence, report.comparison.kl_divergence_standard_error)


def _quantize_cost(report: RunReport) -> str:
    return next((stage_cost(stage) for stage in report.stages if stage.name == QUANTIZE), MISSING)


def _told(difference: Difference, runs: Sequence[Run]) -> str:
    """ "protocol.window: 256 in 2; 512 in the others": by value, the commonest one last."""
    having = {
        value: [index for index, other in enumerate(difference.values) if other == value]
        for value in dict.fromkeys(difference.values)
    }
    *rare, common = sorted(having.items(), key=lambda entry: len(entry[1]))
    last = "the others" if len(common[1]) > 1 else _names(runs, common[1])
    told = [*(f"{_value(value)} in {_names(runs, at)}" for value, at in rare), f"{_value(common[0])} in {last}"]
    return f"{difference.key}: {'; '.join(told)}"


def _names(runs: Sequence[Run], indices: Sequence[int]) -> str:
    return ", ".join(runs[index].name for index in indices)


def _value(value: str | None) -> str:
    return MISSING if value is None else value


def tails(keys: Sequence[str]) -> list[str]:
    """Each key without as many of its first parts as it can do without: "bits", but "gptq.damping" beside "damping"."""
    parts = [key.split(".") for key in keys]
    return [_tail(key, [other for other in parts if other is not key]) for key in parts]


def _tail(key: list[str], others: Sequence[list[str]]) -> str:
    tails = [key[-depth:] for depth in range(1, len(key) + 1)]
    alone = [tail for tail in tails if all(other[-len(tail) :] != tail for other in others)]
    return ".".join(alone[0] if alone else key)


def _cut(label: str) -> str:
    return label if len(label) <= MOST_LABEL_WIDTH else f"{label[: MOST_LABEL_WIDTH - 1]}…"


def _packed(widths: Sequence[int], stub: int, first: int, width: int) -> list[list[int]]:
    """The columns from `first` on, in as few parts as `width` allows beside the stub, each with one at least."""
    beside = sum(widths[:stub]) + GAP * (stub - 1)
    parts: list[list[int]] = []
    taken = width
    for column in range(first, len(widths)):
        if taken + GAP + widths[column] > width:
            parts.append([])
            taken = beside
        parts[-1].append(column)
        taken += GAP + widths[column]
    return parts
