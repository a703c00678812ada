"""A finished run of `jointq quantize`, read from its directory. Large files may be gone, as the manifest has their
hashes; those that exist must still match them."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from jointq_cli.errors import JointqError
from jointq_cli.models.identity import result_hashes
from jointq_cli.records import RunReport
from jointq_cli.report.run_files import load_settings
from jointq_cli.system.files import file_hash
from jointq_cli.system.record_json import load_record, load_report
from jointq_cli.system.run_directory import Manifest, result_files

CODES, CHECKPOINT = "codes/", "checkpoint/"


@dataclass(frozen=True)
class FinishedRun:
    """What the directory of one run contains."""

    directory: Path
    settings: dict[str, str]  # of recipe.yaml: values as text by dotted key, and the option by group
    manifest: Manifest
    report: RunReport
    files: dict[str, str]  # sha256 of each file that the run has written, by its path in the directory

    def files_in(self, folder: str) -> dict[str, str]:
        return {name: self.files[name] for name in sorted(self.files) if name.startswith(folder)}


def read_finished_run(directory: Path) -> FinishedRun:
    """Raises JointqError, which says what is missing or has changed, for anything but a finished `jointq quantize`."""
    place, recipe = directory / "manifest.json", directory / "recipe.yaml"
    if not directory.is_dir():
        raise JointqError(f"{directory}: no such directory")
    if not place.is_file():
        raise JointqError(f"{directory}: has no manifest.json, so it is no finished run of jointq quantize")
    manifest = cast(Manifest, load_record(Manifest, place))
    if manifest.command[1:2] == ["rotate"]:
        raise JointqError(f"{directory}: is a run of jointq rotate; only one of jointq quantize can be reproduced")
    report, settings = load_report(directory / "report.json"), load_settings(recipe)
    if manifest.recipe_sha256 not in (None, file_hash(recipe)):  # older manifests have none
        raise JointqError(
            f"{recipe}: is not the recipe of manifest.json; another run has begun in this directory, or it was changed"
        )
    run = FinishedRun(directory, settings, manifest, report, _hashes(directory, manifest))
    needed = [codes_file(layer.name) for layer in report.layers]
    missing = [name for name in needed if name not in run.files]
    if not any(name.endswith(".safetensors") for name in run.files_in(CHECKPOINT)):
        missing.append(f"{CHECKPOINT}*.safetensors")
    if missing:
        raise JointqError(f"{place}: has no hash of {missing[0]}, and the file is not there")
    return run


def codes_file(layer: str) -> str:
    """The path in a run directory."""
    return f"{CODES}{layer}.safetensors"


def _hashes(directory: Path, manifest: Manifest) -> dict[str, str]:
    """Those of the manifest, which older ones do not have, and which files that exist must match."""
    listed = [directory / name for name in manifest.files] or result_files(directory)
    found = result_hashes(directory, [file for file in listed if file.is_file()])
    for name, digest in found.items():
        if digest != manifest.files.get(name, digest):
            raise JointqError(
                f"{directory / name}: was changed after the run; its sha256 is {digest[:16]}, "
                f"manifest.json has {manifest.files[name][:16]}"
            )
    return manifest.files or found
