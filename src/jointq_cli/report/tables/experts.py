"""How many calibration tokens the experts of a model have received."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from jointq_cli.records import LayerRecord
from jointq_cli.report.number_format import listed, plural
from jointq_cli.report.tables.table import Cell, TextTable

FEWEST = 3  # experts of a block that are named


@dataclass(frozen=True)
class ExpertCounts:
    """tokens: of each expert, by its number, in a module of this name."""

    module: str
    tokens: dict[str, int]

    def below(self, least: int) -> list[str]:
        """The full names of experts with fewer tokens."""
        return [f"{self.module}.{number}" for number, tokens in self.tokens.items() if tokens < least]


def expert_counts(layers: Sequence[LayerRecord]) -> list[ExpertCounts]:
    """Of each module with experts, in the order of the model."""
    found: dict[str, dict[str, int]] = {}
    for layer in layers:
        if layer.tokens is not None:
            module, number, *_ = layer.name.rsplit(".", 2)
            found.setdefault(module, {})[number] = layer.tokens
    return [ExpertCounts(module, tokens) for module, tokens in found.items()]


def few_tokens(layers: Sequence[LayerRecord], least: int) -> list[str]:
    """A warning where experts have received fewer tokens than `least`."""
    counts = expert_counts(layers)
    few = [name for module in counts for name in module.below(least)]
    if not few:
        return []
    experts = sum(len(module.tokens) for module in counts)
    return [
        f"experts.warn_below={least}: {len(few)} of {plural(experts, 'expert')} have received fewer calibration tokens "
        f"({listed(few)}); raise calibration.num_samples"
    ]


def experts_table(layers: Sequence[LayerRecord]) -> list[TextTable]:
    """A row per module with experts; no table without any."""
    rows = []
    for module in expert_counts(layers):
        counts = sorted(module.tokens.values())
        fewest = sorted(module.tokens, key=lambda number: module.tokens[number])[:FEWEST]
        shown = (len(counts), counts[0], f"{median(counts):g}", counts[-1], sum(not count for count in counts))
        names = ", ".join(f"{number} ({module.tokens[number]})" for number in fewest)
        rows.append([Cell(str(text)) for text in (module.module, *shown, names)])
    heading = ["experts of", "experts", "least", "median", "most", "without any", "fewest"]
    title = "Calibration tokens per expert"
    return [TextTable(title, 1, heading, rows)] if rows else []
