"""The config tree: its place, its groups and the head comments of its files, without composing anything.

Imports neither hydra nor torch, so that help and listings answer at once.
"""

import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def config_dir() -> Path:
    """The config tree: inside the package when installed from a wheel, else beside src/ in the checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent.parent / "configs"


def groups() -> dict[str, dict[str, Path]]:
    """Config group -> option -> its file, both in alphabetical order."""
    folders = sorted(path for path in config_dir().iterdir() if path.is_dir())
    return {folder.name: found for folder in folders if (found := options(folder.name))}


def options(group: str) -> dict[str, Path]:
    """Option name -> file of one config group."""
    return {path.stem: path for path in sorted((config_dir() / group).glob("*.yaml"))}


def default_options(command: str) -> dict[str, str]:
    """Group -> option of the defaults list of a primary config; a recipe may choose others."""
    text = (config_dir() / f"{command}.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^  - (\w+): (\w+)$", text, re.MULTILINE))


def keys(command: str) -> dict[str, str]:
    """Key with value -> comment, of the keys that a primary config and the place of its run directories have outside of
    groups."""
    texts = [(config_dir() / f"{name}.yaml").read_text(encoding="utf-8") for name in (command, "run_directory")]
    found = re.findall(r"^(\w+): (\S+) +# (.+)$", "\n".join(texts), re.MULTILINE)
    return {f"{key}={value}": comment for key, value, comment in found}


def head_comment(path: Path) -> list[str]:
    """The comment lines that a yaml file opens with, without `# ` and without Hydra's package line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return [line for line in lines if not line.startswith("@package")]


def summary(path: Path) -> str:
    """One line on the purpose of a config file: its description, or the first line of its head comment."""
    described = re.search(r"^description: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return described.group(1) if described else head_comment(path)[0]


def needs(recipe: Path) -> str:
    """The text after `Needs:` in the head comment of a recipe."""
    return next(line.removeprefix("Needs:").strip() for line in head_comment(recipe) if line.startswith("Needs:"))
