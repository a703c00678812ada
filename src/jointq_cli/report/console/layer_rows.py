"""The table of layers that grows while a run quantises, as plain text: for the log, for pipes and for the terminal.

Knows what a row contains and how wide it may be. Writes nothing.
"""

from jointq_cli.records import LayerRecord
from jointq_cli.report.number_format import damping_text, scientific, shortened
from jointq_cli.report.summary import layer_notes

# Heading and width of the columns after the layer's name, each right-aligned after two blanks.
COLUMNS = (("shape", 11), ("E_y", 7), ("E_w", 7), ("damping", 7), ("s", 5))
VERDICT_WIDTH = 8
WIDTH_AFTER_NAME = sum(width + 2 for _, width in COLUMNS) + 2 + VERDICT_WIDTH
LEAST_NAME_WIDTH = 12
MOST_NAME_WIDTH = 56
FULL_NAME_WIDTH = 32  # in a narrower column, each name begins at the number of its block
PLAIN_NAME_WIDTH = 40  # in the log and in pipes


def name_width(line_width: int) -> int:
    """How many characters of a line of `line_width` are left for a layer's name."""
    return max(LEAST_NAME_WIDTH, min(MOST_NAME_WIDTH, line_width - 1 - WIDTH_AFTER_NAME))


def layer_heading(width: int = PLAIN_NAME_WIDTH) -> str:
    """width: of the name's column."""
    cells = "".join(f"  {heading:>{cell}}" for heading, cell in COLUMNS)
    return f"{'layer':<{width}}{cells}  verdict"


def layer_row(layer: LayerRecord, width: int) -> str:
    """One row, without the quantizer's notes. width: of the name's column."""
    values = (
        f"{layer.out_features}x{layer.in_features}",
        scientific(layer.output_error),
        scientific(layer.weight_error),
        damping_text(layer.damping),
        f"{layer.seconds:.{2 if layer.seconds < 99.995 else 0}f}",
    )
    cells = "".join(f"  {value:>{cell}}" for value, (_, cell) in zip(values, COLUMNS, strict=True))
    return f"{_label(layer, width):<{width}}{cells}  {layer.verdict}"


def layer_row_with_notes(layer: LayerRecord) -> str:
    """One complete row, for the log and for pipes."""
    notes = layer_notes(layer)
    row = layer_row(layer, PLAIN_NAME_WIDTH)
    return f"{row:<{PLAIN_NAME_WIDTH + WIDTH_AFTER_NAME}}  {notes}" if notes else row


def _label(layer: LayerRecord, width: int) -> str:
    """The layer's name in at most `width` characters, always with the number of its block if that fits."""
    _, block, rest = layer.name.partition(f".{layer.block}.")
    name = layer.name if width >= FULL_NAME_WIDTH or not block else f"…{block[1:]}{rest}"
    return shortened(name, width)
