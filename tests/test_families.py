"""The script that tries every family of models: one is right, one is not exported whole, one is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_families.py"


@pytest.mark.slow
def test_families_are_tried_and_listed(tmp_path: Path) -> None:
    table = tmp_path / "families.md"
    command = [sys.executable, SCRIPT, "--work", tmp_path / "work", "--table", table, "llama", "gpt2", "cpmant"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    right, unexported, refused, counts = (line.split() for line in printed)
    assert right[:3] == ["llama", "right", "100%"]
    assert {"R1+R2,", "compressed-tensors", "gptq", "gguf:q4_1", "mlx"} <= set(right)
    assert unexported[:3] == ["gpt2", "right", "100%"]
    assert "none" in unexported
    assert refused[:2] == ["cpmant", "refused"]
    assert " ".join(counts).startswith("3 families: 2 right, 1 refused, 0 wrong, 0 not built; 66.7%")
    assert "| llama | right | 100.0% |  | R1+R2 | compressed-tensors, gptq, gguf:q4_1, mlx |" in table.read_text()
    assert not list((tmp_path / "work" / "files").iterdir())
