"""`jointq -sc install=bash`, and the completions that a shell queries later, which come from Hydra."""

import os
import re

from jointq_cli.cli import config_files
from jointq_cli.cli.commands import store
from jointq_cli.cli.commands.help import GROUPS
from jointq_cli.cli.hydra_main import complete
from jointq_cli.cli.main import COMMANDS


def main(arguments: list[str]) -> int:
    queried = any(word.startswith("query=") for word in arguments)
    lines = [" ".join(_answers(arguments))] if queried else complete("quantize", arguments)
    print("\n".join(lines))
    return 0


def _answers(arguments: list[str]) -> list[str]:
    """The words that complete the shell's line, which is in COMP_LINE."""
    line = os.environ.get("COMP_LINE", "")
    before = line.split() if line.endswith(" ") else line.split()[:-1]  # complete words before the cursor
    if len(before) < 2:
        return [name for name in COMMANDS if line.endswith(" ") or name.startswith(line.split()[-1])]
    command = before[1]
    if command == "recipes":
        return ["show"] if len(before) == 2 else list(config_files.options("recipe"))
    if command == "store":
        return list(store.WORDS) if len(before) == 2 else []
    return _composed(command, line, arguments) if command in GROUPS else []


def _composed(command: str, line: str, arguments: list[str]) -> list[str]:
    os.environ["COMP_LINE"] = re.sub(r"^(\s*\S+\s+)\S+\s*", r"\1", line)
    words = " ".join(complete(command, arguments)).split()
    return [word for word in words if not word.startswith("schema")]
