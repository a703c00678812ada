"""A finished run, run again: the same recipe through the same border, into a fresh directory with a store of its own.

Knows how a replay is asked for, what may be changed for it, and what must be there before it begins. Knows nothing of
how the two runs compare.
"""

import glob
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from jointq_cli.cli.compose import Job, Task, command_line, launch
from jointq_cli.errors import ConfigError, Interrupted, JointqError, ModelError, TextError, UntrustedResult
from jointq_cli.models.sources import looks_local
from jointq_cli.recipe import Recipe
from jointq_cli.report.compare.run_files import parse_settings
from jointq_cli.report.reproduction import GIVEN, deciding_differences
from jointq_cli.report.reproduction.finished_run import FinishedRun
from jointq_cli.system.inventory import entries

RECIPE = "replayed"
ADMITTED = "runtime.device, runtime.num_threads, model.path and other places of files"


def replay(run: FinishedRun, fresh: Path, overrides: list[str], typed: list[str], task: Task) -> None:
    """Runs `run` again in `fresh`, by `task`, on the device and with the threads of the first time.

    overrides: of what does not decide the result. typed: the words behind `jointq`, for the manifest. A result that
    cannot be trusted is one to compare all the same. Raises JointqError for any other override, for a directory that is
    not fresh, for files that are not there and for a recipe that does not give the same config again, and leaves
    nothing then; and whatever the run itself raises.
    """
    given = [_checked(override) for override in overrides]
    _check_fresh(fresh, run.directory)

    def checked_task(recipe: Recipe, job: Job) -> None:
        _check_places(recipe, run)
        _check_config(job, run)
        with command_line(typed), suppress(UntrustedResult):
            task(recipe, job)

    place = fresh.absolute()
    words = [
        f"recipe={RECIPE}",
        *(f"{key}={_quoted(value)}" for key, value in _recorded(run, given).items() if key not in given),
        *overrides,
        f"output_dir={_quoted(str(place))}",
        f"store={_quoted(str(place / 'store'))}",
        f"hydra.run.dir={_quoted(str(place))}",
    ]
    with _folder_of_recipes(run.directory / "recipe.yaml") as folder, _tidied(fresh), _told_to_start_anew(fresh):
        launch("quantize", [*words, "--config-dir", str(folder)], checked_task)


def _checked(override: str) -> str:
    """Its key."""
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"{override}: settings are written KEY=VALUE; a replay takes {ADMITTED}")
    if key not in GIVEN:
        raise ConfigError(f"{override}: a replay takes {key} from the run; it can be given {ADMITTED}")
    return key


def _recorded(run: FinishedRun, given: list[str]) -> dict[str, str]:
    """By key, what the recipe left open and the manifest tells: how the run computed, and which commits it read.

    A commit of the hub means nothing where another place is given.
    """
    texts = {section: text for section, text in run.manifest.texts.items() if "repository" in text}
    sources = {"model": run.manifest.model, **texts}
    revisions = {
        f"{section}.revision": source.get("revision", "")
        for section, source in sources.items()
        if f"{section}.path" not in given
    }
    return {
        "runtime.device": run.manifest.device.partition(":")[0],
        "runtime.num_threads": str(run.manifest.threads),
        **{
            key: revision
            for key, revision in revisions.items()
            if run.settings.get(key) == "null" and re.fullmatch("[0-9a-f]{40}", revision)
        },
    }


def _check_fresh(directory: Path, run: Path) -> None:
    if directory.resolve().is_relative_to(run.resolve()):
        raise JointqError(f"--directory={directory}: lies in the run that it would be compared with")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise JointqError(f"--directory={directory}: must be new or empty, since nothing may be reused")


def _check_places(recipe: Recipe, run: FinishedRun) -> None:
    """Files of the first run's machine: what is not there would be found out later, or looked for on the hub."""
    path = recipe.model.path
    was_local = run.manifest.model.get("from") == "disk" and path == run.settings.get("model.path")
    if (was_local or looks_local(path) or path.endswith(".gguf")) and not Path(path).expanduser().exists():
        raise ModelError(
            f"model.path={path}: the model of {run.directory} is not there, seen from {Path.cwd()}; give model.path=DIR"
        )
    texts = {
        "calibration.tokens": recipe.calibration.tokens,
        "calibration.path": recipe.calibration.path,
        "evaluation.path": recipe.evaluation.path,
    }
    for key, pattern in texts.items():
        file = Path(pattern or "").expanduser()
        if pattern and not (file.exists() or glob.glob(str(file), recursive=True)):
            raise TextError(f"{key}={pattern}: not there, seen from {Path.cwd()}; give {key}=FILE")


def _check_config(job: Job, run: FinishedRun) -> None:
    recipe = run.directory / "recipe.yaml"
    differing = deciding_differences(run.settings, parse_settings(job.config, recipe))
    if differing:
        raise ConfigError(f"{recipe}: does not give its own config again: {', '.join(differing)}")


@contextmanager
def _folder_of_recipes(recipe: Path) -> Iterator[Path]:
    """A folder for --config-dir that holds this recipe as RECIPE."""
    with TemporaryDirectory(prefix="jointq-") as folder:
        (Path(folder) / "recipe").mkdir()
        shutil.copyfile(recipe, Path(folder) / "recipe" / f"{RECIPE}.yaml")
        yield Path(folder)


@contextmanager
def _tidied(directory: Path) -> Iterator[None]:
    """Afterwards without its store, which nothing else will use; and gone, if it failed before a stage was finished."""
    existed, store = directory.exists(), directory / "store"
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
def _told_to_start_anew(directory: Path) -> Iterator[None]:
    """An interrupted run says that the same command continues. This one does not."""
    try:
        yield
    except Interrupted as interrupted:
        raise Interrupted(
            f"interrupted; a replay reuses nothing and starts anew; remove {directory} if it is there"
        ) from interrupted


def _quoted(text: str) -> str:
    """For Hydra, to which blanks and commas mean something, and digits a number."""
    return "'" + text.replace("'", "\\'") + "'"
