"""The table of layers that grows while a run quantises: a row has fixed columns and no more than a line."""

from collections.abc import Callable

from rich.text import Text

from jointq_cli.records import LayerRecord
from jointq_cli.report.number_format import damping_text, scientific, shortened
from jointq_cli.report.summary import DAMPED, FALLBACK, layer_notes

MOST_WIDTH = 110  # of a row without its notes
NAME = 18  # characters that a name needs at least; where they are not left, E_y is the only column
FULL_NAME = 32  # characters below which names begin at the number of their block
COLUMNS: dict[str, tuple[int, Callable[[LayerRecord], str]]] = {
    "shape": (11, lambda layer: f"{layer.out_features}x{layer.in_features}"),
    "E_y": (7, lambda layer: scientific(layer.output_error)),
    "E_w": (7, lambda layer: scientific(layer.weight_error)),
    "damping": (7, lambda layer: damping_text(layer.damping)),
    "s": (5, lambda layer: f"{layer.seconds:.{2 if layer.seconds < 99.995 else 0}f}"),
}  # width and text by heading, each after two blanks
VERDICT = 8
LEGEND = (
    "E_y, E_w: relative squared error of a layer's output and of its weight; damping: share of its mean that is added "
    "to the Hessian's diagonal; lambda: how much JointQ keeps to the weight beside the output"
)
STYLES = {FALLBACK: "bold red", DAMPED: "yellow"}


def layer_row(layer: LayerRecord | None, line_width: int) -> Text:
    """The row of a layer, with its notes if a line holds them; None: the heading."""
    for columns in (COLUMNS, {"E_y": COLUMNS["E_y"]}):
        width = min(line_width, MOST_WIDTH) - sum(2 + cell for cell, _ in columns.values()) - 2 - VERDICT
        if width >= NAME:
            break
    cells = "".join(f"  {text(layer) if layer else heading:>{cell}}" for heading, (cell, text) in columns.items())
    if layer is None:
        return Text(f"{'layer':<{width}}{cells}  verdict", style="bold")
    row = Text(f"{_label(layer, width):<{width}}{cells}  {layer.verdict}", STYLES.get(layer.verdict, ""))
    notes = layer_notes(layer)
    if notes and len(row) + len(notes) + 2 <= line_width:
        row.append(f"  {notes}", style="dim")
    return row


def _label(layer: LayerRecord, width: int) -> str:
    """Its name in at most `width` characters, always with the number of its block if that fits."""
    _, block, rest = layer.name.partition(f".{layer.block}.")
    return shortened(layer.name if width >= FULL_NAME or not block else f"…{block[1:]}{rest}", width)
