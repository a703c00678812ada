"""`jointq -sc install=bash`, and what a shell asks later: Hydra answers for the command on the line."""

import os
import re

from jointq_cli.cli import config_files as resources
from jointq_cli.cli.commands import store
from jointq_cli.cli.commands.help import GROUPS
from jointq_cli.cli.compose import complete
from jointq_cli.cli.main import COMMANDS


def main(arguments: list[str]) -> int:
    asked = any(word.startswith("query=") for word in arguments)
    lines = [" ".join(_answers(arguments))] if asked else complete("quantize", arguments)
    print("\n".join(lines))
    return 0


def _answers(arguments: list[str]) -> list[str]:
    """The words that may stand where the cursor is; the shell's line is in COMP_LINE."""
    line = os.environ.get("COMP_LINE", "")
    before = line.split() if line.endswith(" ") else line.split()[:-1]  # whole words before the cursor
    if len(before) < 2:
        return [name for name in COMMANDS if line.endswith(" ") or name.startswith(line.split()[-1])]
    command = before[1]
    if command == "recipes":
        return ["show"] if len(before) == 2 else list(resources.options("recipe"))
    if command == "store":
        return list(store.WORDS) if len(before) == 2 else []
    return _composed(command, line, arguments) if command in GROUPS else []


def _composed(command: str, line: str, arguments: list[str]) -> list[str]:
    os.environ["COMP_LINE"] = re.sub(r"^(\s*\S+\s+)\S+\s*", r"\1", line)
    words = " ".join(complete(command, arguments)).split()
    return [word for word in words if not word.startswith("schema")]
