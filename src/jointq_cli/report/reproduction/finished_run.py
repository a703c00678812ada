"""What a finished run of `jointq quantize` has left behind, read back so that it can be compared with another one.

Knows which files of a run directory that takes. Large files may have been deleted: the manifest has their hashes, and
those that are there must have them still. Compares no runs and runs nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from jointq_cli.errors import JointqError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.records import RunReport
from jointq_cli.report import load_record, load_report
from jointq_cli.report.compare.run_files import load_settings
from jointq_cli.system.files import file_hash, file_hashes
from jointq_cli.system.run_directory import Manifest, result_files

CODES = "codes"  # the folder


@dataclass(frozen=True)
class Evidence:
    """One run, as its directory tells of it."""

    directory: Path
    settings: dict[str, str]  # of recipe.yaml: values as text by dotted key, and the option by group
    manifest: Manifest
    report: RunReport
    files: dict[str, str]  # sha256 by path in the directory, of all that the run has made


def read_evidence(directory: Path) -> Evidence:
    """Raises JointqError, which says what is missing, for anything but a finished run of `jointq quantize`."""
    if not directory.is_dir():
        raise JointqError(f"{directory}: no such directory")
    if (directory / "evaluation.json").is_file():
        raise _of_another_command(directory, "evaluate")
    if not (directory / "manifest.json").is_file():
        raise JointqError(f"{directory}: has no manifest.json, so it is no finished run of jointq quantize")
    manifest = cast(Manifest, load_record(Manifest, directory / "manifest.json"))
    if manifest.command[1:2] == ["rotate"]:
        raise _of_another_command(directory, "rotate")
    report = load_report(directory / "report.json")
    settings = load_settings(directory / "recipe.yaml")
    _check_recipe(directory / "recipe.yaml", manifest)
    _check_unchanged(directory, manifest.files)
    return Evidence(directory, settings, manifest, report, manifest.files or _hashed(directory, report))


def codes_file(layer: str) -> str:
    """The path in a run directory."""
    return f"{CODES}/{layer}.safetensors"


def code_files(run: Evidence) -> list[str]:
    """All that the run has hashes of."""
    return sorted(name for name in run.files if name.startswith(f"{CODES}/"))


def _check_recipe(recipe: Path, manifest: Manifest) -> None:
    """Older manifests do not tell."""
    if manifest.recipe_sha256 not in (None, file_hash(recipe)):
        raise JointqError(
            f"{recipe}: is not the recipe of manifest.json; another run has begun in this directory, or it was changed"
        )


def _check_unchanged(directory: Path, listed: dict[str, str]) -> None:
    """Those that are there; the manifest stands for those that are not."""
    there = [directory / name for name in listed if (directory / name).is_file()]
    for name, digest in file_hashes(directory, there).items():
        if digest != listed[name]:
            raise JointqError(
                f"{directory / name}: was changed after the run; its sha256 is {digest[:16]}, "
                f"manifest.json has {listed[name][:16]}"
            )


def _hashed(directory: Path, report: RunReport) -> dict[str, str]:
    needed = ["checkpoint/config.json", *(codes_file(layer.name) for layer in report.layers)]
    missing = [name for name in needed if not (directory / name).is_file()]
    if missing:
        raise JointqError(
            f"{directory}/manifest.json: has no hashes of files, and {missing[0]} is not there; "
            "a run of before hashes were kept needs its checkpoint/ and codes/"
        )
    Checkpoint(directory / "checkpoint")  # has all its weights
    return file_hashes(directory, result_files(directory))


def _of_another_command(directory: Path, command: str) -> JointqError:
    return JointqError(f"{directory}: is a run of jointq {command}; only one of jointq quantize can be reproduced")
