"""How many calibration tokens the experts of a model have received."""

from collections.abc import Sequence
from statistics import median

from jointq_cli.records import LayerRecord
from jointq_cli.report.number_format import listed, plural
from jointq_cli.report.tables.table import TextTable

FEWEST = 3  # experts of a block that are named


def expert_counts(layers: Sequence[LayerRecord]) -> dict[str, dict[str, int]]:
    """The tokens of each expert, by its number, of each module with experts, in the order of the model."""
    found: dict[str, dict[str, int]] = {}
    for layer in layers:
        if layer.tokens is not None:
            module, number, *_ = layer.name.rsplit(".", 2)
            found.setdefault(module, {})[number] = layer.tokens
    return found


def few_tokens(layers: Sequence[LayerRecord], least: int) -> list[str]:
    """A warning where experts have received fewer tokens than `least`."""
    counts = expert_counts(layers)
    few = [f"{module}.{number}" for module in counts for number, tokens in counts[module].items() if tokens < least]
    experts = plural(sum(map(len, counts.values())), "expert")
    warning = (
        f"experts.warn_below={least}: {len(few)} of {experts} {'has' if len(few) == 1 else 'have'} received fewer "
        f"calibration tokens ({listed(few)}); raise calibration.num_samples"
    )
    return [warning] if few else []


def experts_table(layers: Sequence[LayerRecord]) -> TextTable:
    """A row per module with experts."""
    rows = []
    for module, tokens in expert_counts(layers).items():
        counts = sorted(tokens.values())
        fewest = ", ".join(
            f"{number} ({tokens[number]})" for number in sorted(tokens, key=lambda n: tokens[n])[:FEWEST]
        )
        numbers = (len(counts), counts[0], f"{median(counts):g}", counts[-1], counts.count(0))
        rows.append([module, *map(str, numbers), fewest])
    heading = ["experts of", "experts", "least", "median", "most", "without any", "fewest"]
    return TextTable("Calibration tokens per expert", heading, rows)
