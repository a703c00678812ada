"""Imports inside the report room point one way, as the docstring of jointq_cli.report says."""

import ast
from pathlib import Path

REPORT = Path(__file__).parents[2] / "src" / "jointq_cli" / "report"
PREFIX = "jointq_cli.report."
# A part imports parts of later rows only, and its own modules.
ORDER = [
    {"console", "pages", "reproduction"},
    {"figures"},
    {"tables"},
    {"summary", "finished_run"},
    {"run_files", "rotation_summary"},
    {"comparison", "limits"},
    {"measured"},
    {"number_format", "grouping"},
]


def test_imports_inside_the_room_point_one_way() -> None:
    row = {part: number for number, parts in enumerate(ORDER) for part in parts}
    wrong = set()
    for path in REPORT.rglob("*.py"):
        part = path.relative_to(REPORT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if part == "__init__" or not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            names = [f"{node.module}.{name.name}".removeprefix(PREFIX) for name in node.names]
            imported = {name.split(".")[0] for name in names if f"{node.module}.".startswith(PREFIX)} - {part}
            wrong |= {f"{part} imports {other}" for other in imported if row.get(other, -1) <= row[part]}
    assert wrong == set()
