"""A store that is only looked at: what it has is found, and nothing is made, not even its directory.

What is not there still has a key, from which the keys of all that depends on it follow. Knows keys and directories,
not what lies in them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.system.hash_cache import cached_hash
from jointq_cli.system.integrity import has_expected_sizes
from jointq_cli.system.inventory import artifact_path, partial_path
from jointq_cli.system.store import Artifact, Store, artifact_key


class NotThere(Exception):
    """Somebody wants to open what is yet to be made: the end of what can be told of a stage."""


class NotRead(NotThere):
    """A key needs the hash of weights that no run has noted."""


class Absent(Artifact):
    """An artifact that is yet to be made: it has a key and no path."""

    def __init__(self, key: str) -> None:
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "reused", False)

    @property
    def path(self) -> Path:
        raise NotThere(self.key)


@dataclass(frozen=True)
class Finding:
    """What was looked for last. scratch: what an interrupted run has left of it, if that would be continued."""

    reused: bool
    scratch: Path | None


class Catalogue(Store):
    """The artifacts under a directory, which need not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: Finding | None = None

    def reuse(
        self,
        stage: str,
        spec: object,
        inputs: list[str],
        make: Callable[[Path], None],
        *,
        resumable: bool = False,
        **how_it_is_made: Any,
    ) -> Artifact:
        """The artifact, or an absent one; `make` is never called."""
        key = artifact_key(stage, spec, inputs)
        name = f"{stage}-{key[:16]}"
        path, scratch = artifact_path(self.root, name), partial_path(self.root, name)
        is_there = path.is_dir() and has_expected_sizes(path)
        self.found = Finding(is_there, scratch if resumable and not is_there and scratch.is_dir() else None)
        return Artifact(path, key, reused=True) if is_there else Absent(key)

    def reuse_within(
        self,
        stage: str,
        spec: object,
        inputs: list[str],
        make: Callable[[Path], None],
        **how_it_is_made: Any,
    ) -> Artifact:
        return self.reuse(stage, spec, inputs, make, **how_it_is_made)

    def has_any(self, stage: str) -> bool:
        """Whether there is, or has been begun, an artifact of this stage at all."""
        return any(self.root.glob(f"{stage}-*")) or any(self.root.glob(f"partial/{stage}-*"))


class Unread(Checkpoint):
    """A checkpoint whose weights are not read: its hash is the one that a run has noted in the store at `root`."""

    def __init__(self, directory: Path, root: Path) -> None:
        super().__init__(directory)
        self._root = root

    @property
    def content_hash(self) -> str:
        """Raises NotRead where nothing is noted, or the files have changed since."""
        noted = cached_hash(self._root, self.directory, self.hashed_files)
        if noted is None:
            raise NotRead(str(self.directory))
        return noted
