"""The output directory of a run: the names of its files, its manifest, and atomic writes.

Knows nothing of what the reports say or how a model is stored.
"""

import hashlib
import itertools
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from jointq_cli.errors import ConfigError
from jointq_cli.system import machine
from jointq_cli.system.files import encoded, translated_disk_errors, write_text_atomically
from jointq_cli.system.locks import Kind, Lock, try_lock

LOCK = ".run.lock"  # exists while a run writes, which holds it
MODEL_CARD = "README.md"  # of a checkpoint
# The files that are reproducible to the byte; the others contain times or a log.
RESULTS = ("allocation.yaml", "rotation/*.safetensors", "codes/*.safetensors", "checkpoint/*", "export/*/*")


@dataclass(frozen=True)
class Manifest:
    """What one needs to repeat a run elsewhere, and to see why the result may differ there."""

    command: list[str]  # as typed
    created: str  # local time with its offset
    versions: dict[str, str]
    commit: str | None  # of this project, None when it was installed
    platform: str
    device: str
    cpu_count: int  # cores the process may use
    threads: int  # of each process
    seeds: dict[str, int]  # by the key of the recipe
    hashes: dict[str, str]  # sha256 of model, calibration tokens and evaluation windows
    texts: dict[str, dict[str, str]]  # provenance of calibration and evaluation text: revision, sha256, tokenizer
    # The fields below have defaults because older manifests lack them.
    files: dict[str, str] = field(default_factory=dict)  # sha256 of `result_files` by path in the run directory
    cpu: str | None = None  # name and instruction sets, as `machine.cpu` returns them
    gpu: str | None = None
    processes: int = 1
    recipe_sha256: str | None = None  # of recipe.yaml as requested, to detect that a later run has overwritten it
    model: dict[str, str] = field(default_factory=dict)  # as `sources.provenance` returns it


def build_manifest(
    command: Sequence[str],
    device: str,
    threads: int,
    processes: int,
    seeds: dict[str, int],
    hashes: dict[str, str],
    texts: dict[str, dict[str, str]],
    files: dict[str, str],
    gpu: str | None = None,
    recipe_sha256: str | None = None,
    model: dict[str, str] | None = None,
) -> Manifest:
    """The manifest of a run in this process: the arguments, the time, the machine and the versions."""
    return Manifest(
        command=list(command),
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions=machine.versions(),
        commit=machine.project_commit(),
        platform=platform.platform(),
        device=device,
        cpu_count=machine.cpu_count(),
        threads=threads,
        processes=processes,
        seeds=seeds,
        hashes=hashes,
        texts=texts,
        files=files,
        cpu=machine.cpu(),
        gpu=gpu,
        recipe_sha256=recipe_sha256,
        model=model or {},
    )


def result_files(directory: Path) -> list[Path]:
    """The files that the same run reproduces to the byte: rotation, codes, checkpoint and exports, without their model
    cards, which hold what was measured."""
    return [file for pattern in RESULTS for file in sorted(directory.glob(pattern)) if file.name != MODEL_CARD]


class RunDirectory:
    """The results of one run, each under its fixed name.

    Creates the directory and tests at once whether it is writable, rather than after hours of work. Every write is
    atomic. Raises ResourceError with the path where the disk is full, read-only or forbidden.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_hash: str | None = None  # sha256 of the recipe that this run has written
        with translated_disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def overrides(self) -> Path:
        return self.path / "overrides.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def layers(self) -> Path:
        return self.path / "layers.csv"

    @property
    def report_json(self) -> Path:
        return self.path / "report.json"

    @property
    def report_markdown(self) -> Path:
        return self.path / "report.md"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def rotation(self) -> Path:
        """The rotation as JSON and safetensors; exists only if the recipe has one."""
        return self.path / "rotation"

    @property
    def checkpoint(self) -> Path:
        """The quantised model as an ordinary Hugging Face directory; its writer creates it."""
        return self.path / "checkpoint"

    @property
    def codes(self) -> Path:
        """The codes, scales and zero-points as safetensors; their writer creates the directory."""
        return self.path / "codes"

    @property
    def importance(self) -> Path:
        """The mean squares of the inputs of layers as safetensors; older runs have none."""
        return self.path / "importance"

    @property
    def allocation(self) -> Path:
        """Settings of single layers, for `layers.overrides`; exists only if the recipe has a budget."""
        return self.path / "allocation.yaml"

    @property
    def exports(self) -> Path:
        """The quantised model in the layouts of runtimes, a directory each; exists only if the recipe exports."""
        return self.path / "export"

    def claim(self, model: str) -> None:
        """Raises ConfigError where a run that writes a checkpoint of `model` (a path or a name) here would overwrite
        directories that no run has written, or the model itself."""
        foreign = [
            place.name
            for place in (self.checkpoint, self.codes, self.importance, self.rotation, self.exports)
            if os.path.lexists(place)
        ]
        if foreign and not self.recipe.is_file():
            raise ConfigError(
                f"hydra.run.dir={self.path}: has a {foreign[0]}/ that no run of jointq made and that this one would "
                "write into; name another directory"
            )
        source = Path(model).expanduser()
        if source.exists() and source.resolve().is_relative_to(self.path.resolve()):
            raise ConfigError(
                f"model.path={model}: lies in the run directory {self.path}, whose checkpoint/ this run replaces; name "
                "another hydra.run.dir"
            )

    def write_recipe(self, text: str) -> None:
        """text: the resolved recipe as yaml."""
        self.write(self.recipe, text)
        self.recipe_hash = hashlib.sha256(encoded(text)).hexdigest()

    def write_overrides(self, overrides: Sequence[str]) -> None:
        """overrides: as typed, such as "quantizer.bits=3"."""
        # A JSON string is a quoted yaml scalar.
        lines = [f"- {json.dumps(override, ensure_ascii=False)}\n" for override in overrides]
        self.write(self.overrides, "".join(lines) or "[]\n")

    def write_manifest(self, manifest: Manifest) -> None:
        self.write(self.manifest, json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n")

    def write(self, path: Path, text: str) -> None:
        write_text_atomically(path, text)


@contextmanager
def claimed(path: Path, *, new: bool) -> Iterator[RunDirectory]:
    """The run directory at `path`; inside, no other run writes there.

    new: if another run writes or has written there, `path`_2, `path`_3 and so on instead. Else raises ConfigError while
    another run is writing there.
    """
    for place in _numbered(path) if new else [path]:
        run = RunDirectory(place)
        if (lock := _claim(run, new)) is not None:
            break
    else:
        raise ConfigError(
            f"hydra.run.dir={path}: another run is writing there; wait until it ends, or name another directory"
        )
    with lock:
        try:
            yield run
        finally:
            with suppress(OSError):  # a disk that has become read-only
                lock.discard_file()


def _claim(run: RunDirectory, new: bool) -> Lock | None:
    with translated_disk_errors(run.path):
        lock = try_lock(run.path / LOCK, Kind.EXCLUSIVE)
        if lock is None or not (new and run.recipe.exists()):
            return lock
        lock.discard_file()
        lock.release()
        return None


def new_directory(path: Path) -> Path:
    """Creates `path`, or where that exists `path`_2, `path`_3 and so on: each call creates another one."""
    with translated_disk_errors(path):
        return next(place for place in _numbered(path) if _makes(place))


def _makes(directory: Path) -> bool:
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}_{number}")
