"""Resolves `model.path` to a local checkpoint directory: the bundled model, a directory, a GGUF file or the hub."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from jointq_cli.errors import ModelError, ResourceError
from jointq_cli.models.checkpoint import COMPANIONS, PACKED_KEYS, Checkpoint
from jointq_cli.setting_rules import check_settings, setting

BUNDLED = Path(__file__).parents[1] / "pocket"

PUBLISHED = "mxfp4"  # the layout in which gpt-oss is trained and published, with no other checkpoint

UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights that repositories also hold


@dataclass(frozen=True)
class ModelSource:
    """path: "pocket" (the bundled model), a local directory, a FILE.gguf, or a hub id such as org/name."""

    path: str = setting(
        "pocket", pattern=".+", form="name a model: pocket, a directory, a FILE.gguf or a hub id", place=True
    )
    revision: str | None = setting(None, decides=False)  # the hash of the weights decides
    trust_remote_code: bool = setting(False)

    def __post_init__(self) -> None:
        check_settings(self, "model")


def fetch(
    source: ModelSource, converted: Callable[[Path], Path], *, packed: bool = False, offline: bool = False
) -> Checkpoint:
    """The checkpoint that `source` names, as a local directory of safetensors.

    converted: the directory into which a GGUF file (`convert_gguf`), or a quantised checkpoint, is or has been
    converted. packed: whether it may be a quantised one. offline: download nothing. Raises ModelError when the
    checkpoint does not exist or cannot be used, ResourceError when the hub cannot be reached.
    """
    if source.path == "pocket":
        return Checkpoint(BUNDLED)
    local = gguf_in(Path(source.path).expanduser())
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(f"model.path={local}: no such file")
        return Checkpoint(converted(local))
    if local.exists():
        return _opened(local, converted, packed)
    if looks_local(source.path):
        place = "" if Path(source.path).expanduser().is_absolute() else f" in {Path.cwd()}"
        raise ModelError(
            f"model.path={source.path}: no such directory{place}; `jointq recipes` says what a recipe needs"
        )
    downloaded = _downloaded(source, offline)
    try:
        return _opened(downloaded, converted, packed)
    except ModelError as error:
        if offline:  # a part of it, for instance only the tokenizer, is in the cache
            raise _not_downloaded(source) from error
        raise


def provenance(source: ModelSource, directory: Path) -> dict[str, str]:
    """Where the checkpoint that `fetch` returned came from; for the hub with its commit, where known."""
    if source.path == "pocket":
        return {"from": "jointq"}
    if Path(source.path).expanduser().exists():
        return {"from": "disk"}
    # The hub's client stores what it downloads in .../snapshots/COMMIT.
    known = directory.parent.name == "snapshots"
    return {"from": "hub", "revision": directory.name} if known else {"from": "hub"}


def gguf_in(path: Path) -> Path:
    """The GGUF file of a directory that has one and no config.json, as an export has; any other path itself."""
    if not path.is_dir() or (path / "config.json").exists():
        return path
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else path


def looks_local(path: str) -> bool:
    """Whether `path` can only be a local path; hub ids are `name` or `org/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _opened(directory: Path, converted: Callable[[Path], Path], packed: bool) -> Checkpoint:
    """The checkpoint of a directory; a quantised one if `packed`, or if the model was published so."""
    config = Checkpoint(directory, packed=True).config
    settings = next((config[key] for key in PACKED_KEYS if config.get(key)), None)
    is_published = isinstance(settings, dict) and settings.get("quant_method") == PUBLISHED
    return Checkpoint(converted(directory) if settings and (packed or is_published) else directory)


def _downloaded(source: ModelSource, offline: bool) -> Path:
    patterns = ["*.safetensors", *COMPANIONS, *(["*.py"] if source.trust_remote_code else [])]
    try:
        return Path(
            snapshot_download(
                source.path,
                revision=source.revision,
                allow_patterns=patterns,
                ignore_patterns=UNWANTED,
                local_files_only=offline,
            )
        )
    except HFValidationError as error:
        raise ModelError(f"model.path={source.path}: neither a directory here nor a hub id ({error})") from error
    except GatedRepoError as error:
        raise ResourceError(
            f"model.path={source.path}: the hub asks for permission; accept its licence there, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision={source.revision}: {source.path} has no such revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model.path={source.path}: neither a directory here nor a model on the hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if offline:
            raise _not_downloaded(source) from error
        raise ResourceError(
            f"model.path={source.path}: no such directory here, and the hub cannot be reached ({_one_line(error)}); "
            "offline, give a downloaded directory: model.path=DIR"
        ) from error


def _not_downloaded(source: ModelSource) -> ResourceError:
    return ResourceError(
        f"model.path={source.path}: no such directory here, and not downloaded yet; nothing more can be said "
        "before a run has downloaded it from the hub"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
