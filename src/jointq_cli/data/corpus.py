"""Opens the text that a recipe names, wherever it is."""

import platform

from jointq_cli.data import pydoc as pydoc_text
from jointq_cli.data.hub import hub_corpus
from jointq_cli.data.local_files import local_corpus
from jointq_cli.data.text import HUB, Corpus, TextSource


def open_corpus(source: TextSource) -> Corpus:
    """Opens `source`; its documents are fetched only as they are iterated.

    Raises TextError when a file is missing or of an unknown kind, or the hub has no such revision, and ResourceError
    when the hub cannot be reached. Iterating over `documents` raises TextError for a file that is empty, not UTF-8,
    damaged or without the column, and ResourceError when the connection breaks.
    """
    if source.path:
        return local_corpus(source)
    if source.dataset == "pydoc":
        revision = f"python {platform.python_version()}"
        return Corpus(iter(pydoc_text.topics(source.split)), source.provenance(revision=revision))
    return hub_corpus(source, HUB[source.dataset])
