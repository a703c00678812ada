"""The order in which a run quantises layers and measures blocks: where in the model a difference begins."""

from jointq_cli.records import RunReport


def block_name(block: int) -> str:
    return f"block {block}"


def position(name: str, report: RunReport) -> int:
    """Of a layer, or of a block, which comes after its layers, in the order of the run; unknown names come last."""
    blocks = sorted({layer.block for layer in report.layers} | {block.block for block in report.blocks})
    order = [
        entry
        for block in blocks
        for entry in (*(layer.name for layer in report.layers if layer.block == block), block_name(block))
    ]
    return order.index(name) if name in order else len(order)
