"""Data sets of the Hugging Face hub, read with the `datasets` library."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from jointq_cli.data.chat import Document
from jointq_cli.data.text import HUB, Corpus, HubDataset, TextSource, one_line, row_document
from jointq_cli.errors import ResourceError, TextError

HUB_TIMEOUT: Final = 10.0  # seconds to wait for the hub's first answer


def hub_corpus(source: TextSource, hub: HubDataset) -> Corpus:
    """One split of a data set of the hub, or of its copy in the local cache when the hub cannot be reached.

    Raises TextError for an unknown revision, ResourceError when neither the hub nor the cache has the data set.
    """
    commit, failure = _commit(source, hub)
    config = source.config or hub.config
    try:
        with datasets_library(offline=commit is None) as datasets:
            table = datasets.load_dataset(
                hub.repository,
                config,
                split=source.split,
                revision=commit or source.revision,
                streaming=hub.streamed,
            )
    # The hub's client, its transport and datasets each have their own exceptions.
    except Exception as error:
        raise _unreachable(source, hub, failure or error) from error
    revision = commit or _cached_commit(source, hub, table)
    provenance = source.provenance(repository=hub.repository, config=config, revision=revision)
    texts = _hub_rows(source, hub, table)
    return Corpus(texts, provenance, hub.running, hub.joint, hub.streamed, hub.evaluated)


def _commit(source: TextSource, hub: HubDataset) -> tuple[str | None, Exception | None]:
    """The commit that the revision names today; or None and the error with which the hub cannot be reached.

    This request comes first because it fails at once, whereas `datasets` tries six times over 23 seconds.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().dataset_info(hub.repository, revision=source.revision, timeout=HUB_TIMEOUT).sha, None
    except RevisionNotFoundError as error:
        raise TextError(
            f"{source.section}.revision={source.revision}: {hub.repository} has no such revision"
        ) from error
    # Which exceptions a failed connection raises depends on the hub client's transport and its version.
    except Exception as error:
        return None, error


def _cached_commit(source: TextSource, hub: HubDataset, table: Any) -> str:
    """The commit of a data set in the local cache, where `datasets` uses it as the name of a folder."""
    folders = {Path(file["filename"]).parent.name for file in getattr(table, "cache_files", [])}
    commit = next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), "unknown")
    requested = source.revision or ""
    if re.fullmatch("[0-9a-f]{7,40}", requested) and not commit.startswith(requested):
        raise ResourceError(
            f"{source.section}.revision={requested}: the hub cannot be reached, "
            f"and the cache holds {hub.repository} at {commit}"
        )
    return commit


def _hub_rows(source: TextSource, hub: HubDataset, table: Any) -> Iterator[Document]:
    for row in _fetched(source, hub, table):
        document = row_document(source, row, None)
        if hub.running or (document.strip() if isinstance(document, str) else document):
            yield document


def _fetched(source: TextSource, hub: HubDataset, table: Any) -> Iterator[dict[str, Any]]:
    with datasets_library():
        try:
            yield from table
        except Exception as error:  # as above
            raise _unreachable(source, hub, error) from error


def _unreachable(source: TextSource, hub: HubDataset, error: Exception) -> ResourceError:
    key = source.section
    tokens = f"{key}.tokens=FILE, " if hasattr(source, "tokens") else ""
    return ResourceError(
        f"{key}.dataset={source.dataset}: cannot fetch {hub.repository} from the Hugging Face hub "
        f"({one_line(error)}); offline, give a local copy: {key}.path=FILE, {tokens}"
        f"or take {key}.dataset=pydoc {key}.split={key}"
    )


def hub_answers() -> bool:
    """Whether the hub can be reached, and is not switched off by HF_HUB_OFFLINE."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(HUB["wikitext2"].repository, timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        return True
    except Exception:  # as above
        return False
    return True


@contextmanager
def datasets_library(offline: bool = False) -> Iterator[ModuleType]:
    """The `datasets` library with its progress bars and log messages switched off; offline: it reads its cache alone.
    Other libraries that use it inside are quiet and offline as well."""
    import datasets  # late, since it takes more than a second

    config, logging = datasets.config, datasets.logging
    was_offline, verbosity, quiet = (
        config.HF_HUB_OFFLINE,
        logging.get_verbosity(),
        datasets.are_progress_bars_disabled(),
    )
    config.HF_HUB_OFFLINE = was_offline or offline
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        config.HF_HUB_OFFLINE = was_offline
        logging.set_verbosity(verbosity)
        if not quiet:
            datasets.enable_progress_bars()
