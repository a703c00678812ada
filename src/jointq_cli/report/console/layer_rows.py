"""The table of layers that grows while a run quantises, as plain text: for the log, for pipes and for the terminal.

Knows what a row contains and how wide it may be. Writes nothing.
"""

from jointq_cli.records import LayerRecord
from jointq_cli.report.number_format import damping_text, scientific, shortened
from jointq_cli.report.summary import layer_notes

# Heading and width of the columns after the layer's name, each right-aligned after two blanks.
COLUMNS = (("shape", 11), ("E_y", 7), ("E_w", 7), ("damping", 7), ("s", 5))
NARROW_COLUMNS = (("E_y", 7),)  # where the others leave less than LEAST_NAME_WIDTH
VERDICT_WIDTH = 8
LEAST_NAME_WIDTH = 18
MOST_NAME_WIDTH = 56
FULL_NAME_WIDTH = 32  # in a narrower column, each name begins at the number of its block
PLAIN_WIDTH = 98  # of a row without its notes, in the log and in pipes


def layer_heading(line_width: int = PLAIN_WIDTH) -> str:
    width, columns = _layout(line_width)
    return f"{'layer':<{width}}{''.join(f'  {heading:>{cell}}' for heading, cell in columns)}  verdict"


def layer_row(layer: LayerRecord, line_width: int = PLAIN_WIDTH) -> str:
    """One row of at most `line_width` characters, without the quantizer's notes."""
    values = {
        "shape": f"{layer.out_features}x{layer.in_features}",
        "E_y": scientific(layer.output_error),
        "E_w": scientific(layer.weight_error),
        "damping": damping_text(layer.damping),
        "s": f"{layer.seconds:.{2 if layer.seconds < 99.995 else 0}f}",
    }
    width, columns = _layout(line_width)
    cells = "".join(f"  {values[heading]:>{cell}}" for heading, cell in columns)
    return f"{_label(layer, width):<{width}}{cells}  {layer.verdict}"


def layer_row_with_notes(layer: LayerRecord) -> str:
    """One complete row, for the log and for pipes."""
    return f"{layer_row(layer):<{PLAIN_WIDTH - 1}}  {layer_notes(layer)}".rstrip()


def _layout(line_width: int) -> tuple[int, tuple[tuple[str, int], ...]]:
    """The width of the column of names, and the columns after it."""
    for columns in (COLUMNS, NARROW_COLUMNS):
        width = line_width - 1 - sum(cell + 2 for _, cell in columns) - 2 - VERDICT_WIDTH
        if width >= LEAST_NAME_WIDTH:
            break
    return max(LEAST_NAME_WIDTH, min(MOST_NAME_WIDTH, width)), columns


def _label(layer: LayerRecord, width: int) -> str:
    """The layer's name in at most `width` characters, always with the number of its block if that fits."""
    _, block, rest = layer.name.partition(f".{layer.block}.")
    name = layer.name if width >= FULL_NAME_WIDTH or not block else f"…{block[1:]}{rest}"
    return shortened(name, width)
