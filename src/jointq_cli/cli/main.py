"""Dispatch of the arguments of `jointq` to a command.

Imports neither torch nor hydra: help and mistyped commands answer at once.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from jointq_cli import __version__
from jointq_cli.cli import standard_streams
from jointq_cli.errors import AlreadyReported, Interrupted, JointqError
from jointq_cli.system.interrupts import handled_by, raise_at_once

COMMANDS = {
    "quantize": "quantise a model, and measure what that cost",
    "plan": "what quantize would do and cost, before it reads a weight",
    "rotate": "change a model's basis, and nothing else: easier to quantise, same function",
    "evaluate": "perplexity of a checkpoint, by the same protocol",
    "calibrate": "freeze a recipe's calibration tokens, for a machine without network",
    "recipes": "list the recipes that come with jointq, or show one",
    "report": "render a finished run again",
    "export": "a finished run's model in the layout of vLLM, llama.cpp and others",
    "compare": "several finished runs, or a sweep, side by side",
    "check": "whether the figures of a finished run are within limits, by exit code",
    "reproduce": "run a finished run again from its files, and compare",
    "store": "artifacts that runs share: list them, check them, free space",
}
COMPOSED = ("quantize", "plan", "rotate", "evaluate", "calibrate")  # these read a config, the others use argparse
USAGE_ERROR = 2  # as of argparse and most shells
INTERRUPTED = 130  # 128 + SIGINT; of commands that have nothing to continue
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for an error reported in one line, 2 for wrong usage."""
    standard_streams.prepare()
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Set before torch is imported: idle OpenMP threads should sleep. Where another process uses a core too, threads
    # that spin at the end of each product made a GPTQ layer of 256 x 1024 take 0.18 s instead of 0.035 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Likewise: where one of several processes of a run ends, the others report it in one line, and c10d in thirty.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with handled_by(raise_at_once):
            try:
                return _dispatch(arguments)
            finally:
                sys.stdout.flush()
    except JointqError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        return _reported(error)
    except KeyboardInterrupt:
        if arguments and arguments[0] in COMPOSED:
            return _reported(Interrupted())
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        return BROKEN_PIPE


def _reported(error: JointqError) -> int:
    if not isinstance(error, AlreadyReported):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code


def _dispatch(arguments: list[str]) -> int:
    word, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if word == "help" and rest:
        word, rest = rest[0], ["--help"]
    if word in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if word in ("--version", "-V"):
        print(f"jointq {__version__}")
        return 0
    if word in ("--shell-completion", "-sc"):
        return _command("completion", arguments)
    if word not in COMMANDS:
        print(f"error: {_unknown(word)}", file=sys.stderr)
        return USAGE_ERROR
    if word in COMPOSED and {"--help", "-h"} & set(rest):
        return _command("help", [word])
    return _command(word, rest)


def _command(name: str, arguments: list[str]) -> int:
    code: int = importlib.import_module(f"jointq_cli.cli.commands.{name}").main(arguments)
    return code


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return f"""\
jointq {__version__}: quantise Hugging Face language models after training, and prove the result

usage: jointq COMMAND [KEY=VALUE ...]

{commands}

  jointq quantize                      the bundled model, offline, in a minute
  jointq recipes                       what else there is, and what it needs
  jointq COMMAND --help                the groups, keys and options of a command
  eval "$(jointq -sc install=bash)"    shell completion (bash, zsh; fish likewise)"""


def _unknown(word: str) -> str:
    if "=" in word:
        return f"'{word}' is a setting and needs a command before it: jointq quantize {word}"
    close = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(COMMANDS)}"
    return f"no command '{word}'; {hint}"
