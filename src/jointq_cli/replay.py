"""A finished run, run again: the same recipe through the same border, into a fresh directory with a store of its own.

Knows how a replay is asked for, and what may be changed for it. Knows nothing of how the two runs compare.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from jointq_cli.errors import ConfigError, Interrupted, JointqError, ModelError
from jointq_cli.evidence import Evidence
from jointq_cli.launch import Task, launch
from jointq_cli.reproduction import GIVEN
from jointq_cli.sources import looks_local

RECIPE = "replayed"
ADMITTED = "runtime.device, runtime.num_threads, model.path and other places of files"


def replay(run: Evidence, fresh: Path, overrides: list[str], task: Task) -> None:
    """Runs `run` again in `fresh`, by `task`, on the device and with the threads of the first time.

    overrides: of what does not decide the result. Raises JointqError for any other, for a directory that is not fresh
    and for a model that is not there, all before anything is written; and whatever the run itself raises.
    """
    given = dict(map(_checked, overrides))
    _check_fresh(fresh)
    _check_model(given.get("model.path", run.settings.get("model.path", "")), run)
    place = fresh.absolute()
    surroundings = {
        "runtime.device": run.manifest.device.partition(":")[0],
        "runtime.num_threads": str(run.manifest.threads),
    }
    words = [
        f"recipe={RECIPE}",
        *(f"{key}={value}" for key, value in surroundings.items() if key not in given),
        *overrides,
        f"output_dir={_quoted(place)}",
        f"store={_quoted(place / 'store')}",
        f"hydra.run.dir={_quoted(place)}",
    ]
    with _folder_of_recipes(run.directory / "recipe.yaml") as folder, _told_to_start_anew(fresh):
        launch("quantize", [*words, "--config-dir", str(folder)], task)
    shutil.rmtree(
        fresh / "store", ignore_errors=True
    )  # nothing else will use it, and the run directory has what it made


def _checked(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"{override}: settings are written KEY=VALUE; a replay takes {ADMITTED}")
    if key not in GIVEN:
        raise ConfigError(f"{override}: a replay takes {key} from the run; it can be given {ADMITTED}")
    return key, value


def _check_fresh(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise JointqError(f"--directory={directory}: must be new or empty, since nothing may be reused")


def _check_model(path: str, run: Evidence) -> None:
    if (looks_local(path) or path.endswith(".gguf")) and not Path(path).expanduser().exists():
        raise ModelError(
            f"model.path={path}: the model of {run.directory} is not there, seen from {Path.cwd()}; give model.path=DIR"
        )


@contextmanager
def _folder_of_recipes(recipe: Path) -> Iterator[Path]:
    """A folder for --config-dir that holds this recipe as RECIPE."""
    with TemporaryDirectory(prefix="jointq-") as folder:
        (Path(folder) / "recipe").mkdir()
        shutil.copyfile(recipe, Path(folder) / "recipe" / f"{RECIPE}.yaml")
        yield Path(folder)


@contextmanager
def _told_to_start_anew(directory: Path) -> Iterator[None]:
    """An interrupted run says that the same command continues. This one does not."""
    try:
        yield
    except Interrupted as interrupted:
        raise Interrupted(
            f"interrupted; a replay reuses nothing and starts anew, so remove {directory}"
        ) from interrupted


def _quoted(path: Path) -> str:
    """For Hydra, to which blanks and commas in a path mean something."""
    return "'" + str(path).replace("'", "\\'") + "'"
