"""A finished run, run again by its recipe, in a new directory with a store of its own.

Knows which settings a replay may change, and which files must exist before it begins. Compares nothing.
"""

import glob
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import OmegaConf

from jointq_cli.cli.compose import Job, Task, launch
from jointq_cli.cli.hydra_main import command_line
from jointq_cli.cli.renamed_keys import KeyRenamer
from jointq_cli.errors import ConfigError, Interrupted, JointqError, ModelError, TextError, UntrustedResult
from jointq_cli.models.sources import looks_local
from jointq_cli.recipe import Recipe, setting_roles
from jointq_cli.report.finished_run import FinishedRun
from jointq_cli.report.reproduction import deciding_differences
from jointq_cli.report.run_files import parse_settings
from jointq_cli.setting_rules import RENAMED, places
from jointq_cli.system.files import translated_disk_errors
from jointq_cli.system.inventory import entries

RECIPE = "replayed"
# What versions without a setting did, where today's default is something else: for runs that have the first key alone.
BEFORE = {
    ("quantizer.symmetric", "quantizer.zero_point"): "null",
    ("quantizer.symmetric", "quantizer.incoherence"): "none",
    ("refinement.patience", "refinement.backoff"): "1",
    ("curvature.row_blocks", "curvature.rounds"): "0",
}
CHANGEABLE = "runtime.device, runtime.num_threads, model.path and other places of files"


def replay(run: FinishedRun, fresh: Path, overrides: list[str], typed: list[str], task: Task) -> None:
    """Runs `run` again in `fresh`, by `task`, on the device and with the threads of the first time.

    overrides: of settings that do not decide the result. typed: the arguments of `jointq`, for the manifest. A result
    that cannot be trusted is compared all the same. Raises JointqError for any other override, for a directory that is
    not new, for missing files and for a recipe that does not compose the same config again, and leaves nothing then;
    and whatever the run itself raises.
    """
    changed = [_checked_key(override) for override in overrides]
    _check_fresh(fresh, run.directory)

    def checked_task(recipe: Recipe, job: Job) -> None:
        _check_places(recipe, run)
        _check_config(job, run)
        with command_line(typed), suppress(UntrustedResult):
            task(recipe, job)

    place = fresh.absolute()
    words = [
        f"recipe={RECIPE}",
        *(f"{key}={_quoted(value)}" for key, value in _recorded(run, changed).items() if key not in changed),
        *overrides,
        f"output_dir={_quoted(str(place))}",
        f"store={_quoted(str(place / 'store'))}",
        f"hydra.run.dir={_quoted(str(place))}",
    ]
    with _folder_of_recipes(run.directory / "recipe.yaml") as folder, _tidied(fresh), _not_continued(fresh):
        launch("quantize", [*words, "--config-dir", str(folder)], checked_task)


def _checked_key(override: str) -> str:
    """The key of an override, if a replay may change it."""
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"{override}: settings are written KEY=VALUE; a replay takes {CHANGEABLE}")
    if RENAMED.get(key, key) not in setting_roles().replayable:
        raise ConfigError(f"{override}: a replay takes {key} from the run; it can change {CHANGEABLE}")
    return RENAMED.get(key, key)


def _recorded(run: FinishedRun, changed: list[str]) -> dict[str, str]:
    """By key, what the recipe left open: by the manifest device, threads and the commits that were read, and what the
    run's version did without yet.

    A commit of the hub means nothing where the path is changed.
    """
    texts = {section: text for section, text in run.manifest.texts.items() if "repository" in text}
    sources = {"model": run.manifest.model, **texts}
    revisions = {
        f"{section}.revision": source.get("revision", "")
        for section, source in sources.items()
        if f"{section}.path" not in changed
    }
    return {
        "runtime.device": run.manifest.device.partition(":")[0],
        "runtime.num_threads": str(run.manifest.threads),
        **{
            key: revision
            for key, revision in revisions.items()
            if run.settings.get(key) == "null" and re.fullmatch("[0-9a-f]{40}", revision)
        },
        **{new: value for (old, new), value in BEFORE.items() if old in run.settings and new not in run.settings},
    }


def _check_fresh(directory: Path, run: Path) -> None:
    if directory.resolve().is_relative_to(run.resolve()):
        raise JointqError(f"--directory={directory}: lies in the run that it would be compared with")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise JointqError(f"--directory={directory}: must be new or empty, since nothing may be reused")


def _check_places(recipe: Recipe, run: FinishedRun) -> None:
    """Raises JointqError for missing files, which would otherwise be noticed later, or looked for on the hub."""
    path = recipe.model.path
    was_local = run.manifest.model.get("from") == "disk" and path == run.settings.get("model.path")
    if (was_local or looks_local(path) or path.endswith(".gguf")) and not Path(path).expanduser().exists():
        raise ModelError(
            f"model.path={path}: the model of {run.directory} is not there, seen from {Path.cwd()}; give model.path=DIR"
        )
    for key, pattern in places(recipe):
        file = Path(pattern).expanduser()
        if key != "model.path" and not (file.exists() or glob.glob(str(file), recursive=True)):
            raise TextError(f"{key}={pattern}: not there, seen from {Path.cwd()}; give {key}=FILE")


def _check_config(job: Job, run: FinishedRun) -> None:
    recipe = run.directory / "recipe.yaml"
    differing = deciding_differences(run.settings, parse_settings(job.config, recipe), setting_roles())
    if differing:
        raise ConfigError(f"{recipe}: does not give its own config again: {', '.join(differing)}")


@contextmanager
def _folder_of_recipes(recipe: Path) -> Iterator[Path]:
    """A folder for --config-dir that holds this recipe as RECIPE, by the keys of today."""
    config = OmegaConf.load(recipe)
    KeyRenamer(silent=True).config(config)  # the user has not written it
    with TemporaryDirectory(prefix="jointq-") as folder:
        (Path(folder) / "recipe").mkdir()
        text = f"# @package _global_\n{OmegaConf.to_yaml(config)}"
        (Path(folder) / "recipe" / f"{RECIPE}.yaml").write_text(text, encoding="utf-8")
        yield Path(folder)


@contextmanager
def _tidied(directory: Path) -> Iterator[None]:
    """Afterwards removes the store, which no other run will use; and the directory, if no stage was finished.

    Raises JointqError where another replay has begun in the directory: its store exists.
    """
    existed, store = directory.exists(), directory / "store"
    with translated_disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            store.mkdir()
        except FileExistsError as error:
            raise JointqError(f"--directory={directory}: another replay is writing there") from error
    try:
        yield
    except JointqError:
        if not (store.is_dir() and any(not entry.is_partial for entry in entries(store))):
            shutil.rmtree(directory, ignore_errors=True)
            if existed:
                directory.mkdir()
        raise
    finally:
        shutil.rmtree(store, ignore_errors=True)


@contextmanager
def _not_continued(directory: Path) -> Iterator[None]:
    """An interrupted run says that the same command continues. A replay does not."""
    try:
        yield
    except Interrupted as interrupted:
        raise Interrupted(
            f"interrupted; a replay reuses nothing and starts from the beginning; remove {directory} if it exists"
        ) from interrupted


def _quoted(text: str) -> str:
    """For Hydra's grammar, where blanks and commas have a meaning, and digits are a number. null stays null."""
    return text if text == "null" else "'" + text.replace("'", "\\'") + "'"
