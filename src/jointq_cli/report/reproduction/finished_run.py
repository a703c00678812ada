"""A finished run of `jointq quantize`, read from its directory for the comparison with another run.

Knows which files of a run directory are needed. Large files may have been deleted, as the manifest has their hashes;
those that exist must still match them. Compares no runs and runs nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from jointq_cli.errors import JointqError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.identity import result_hashes
from jointq_cli.records import RunReport
from jointq_cli.report.compare.run_files import load_settings
from jointq_cli.system.files import file_hash
from jointq_cli.system.record_json import load_record, load_report
from jointq_cli.system.run_directory import Manifest, result_files

CODES = "codes"  # the folder


@dataclass(frozen=True)
class FinishedRun:
    """What the directory of one run contains."""

    directory: Path
    settings: dict[str, str]  # of recipe.yaml: values as text by dotted key, and the option by group
    manifest: Manifest
    report: RunReport
    files: dict[str, str]  # sha256 of each file that the run has written, by its path in the directory

    def position(self, name: str) -> int:
        """Of a layer, or of a block, which comes after its layers, in the order of the run; unknown names come last."""
        layers, blocks = self.report.layers, self.report.blocks
        order = [
            entry
            for block in sorted({layer.block for layer in layers} | {block.block for block in blocks})
            for entry in (*(layer.name for layer in layers if layer.block == block), block_name(block))
        ]
        return order.index(name) if name in order else len(order)


def read_finished_run(directory: Path) -> FinishedRun:
    """Raises JointqError, which says what is missing or has changed, for anything but a finished `jointq quantize`."""
    place = directory / "manifest.json"
    if not directory.is_dir():
        raise JointqError(f"{directory}: no such directory")
    if (directory / "evaluation.json").is_file():
        raise _of_another_command(directory, "evaluate")
    if not place.is_file():
        raise JointqError(f"{directory}: has no manifest.json, so it is no finished run of jointq quantize")
    manifest = cast(Manifest, load_record(Manifest, place))
    if manifest.command[1:2] == ["rotate"]:
        raise _of_another_command(directory, "rotate")
    report, recipe = load_report(directory / "report.json"), directory / "recipe.yaml"
    settings = load_settings(recipe)
    if manifest.recipe_sha256 not in (None, file_hash(recipe)):  # older manifests have none
        raise JointqError(
            f"{recipe}: is not the recipe of manifest.json; another run has begun in this directory, or it was changed"
        )
    _check_unchanged(directory, manifest.files)
    return FinishedRun(directory, settings, manifest, report, manifest.files or _hashed(directory, report))


def block_name(block: int) -> str:
    return f"block {block}"


def codes_file(layer: str) -> str:
    """The path in a run directory."""
    return f"{CODES}/{layer}.safetensors"


def code_files(run: FinishedRun) -> list[str]:
    """Those of which the run has hashes."""
    return sorted(name for name in run.files if name.startswith(f"{CODES}/"))


def _check_unchanged(directory: Path, listed: dict[str, str]) -> None:
    """Checks the files that exist; for deleted ones the hashes of the manifest are used."""
    existing = [directory / name for name in listed if (directory / name).is_file()]
    for name, digest in result_hashes(directory, existing).items():
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
    Checkpoint(directory / "checkpoint")  # raises if weights are missing
    return result_hashes(directory, result_files(directory))


def _of_another_command(directory: Path, command: str) -> JointqError:
    return JointqError(f"{directory}: is a run of jointq {command}; only one of jointq quantize can be reproduced")
