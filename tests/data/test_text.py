"""Which text a recipe names: rules of the settings, and the hash of a text."""

import hashlib

import pytest
from text_cases import source

from jointq_cli.data import pydoc as pydoc_text
from jointq_cli.data.corpus import open_corpus
from jointq_cli.data.text import text_hash
from jointq_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "wikitext"}, "evaluation.dataset=wikitext: must be one of pydoc, text, wikitext2, c4"),
        ({"dataset": "text"}, "evaluation.dataset=text: needs evaluation.path=FILE"),
        ({"dataset": "pydoc", "path": "a.txt"}, "evaluation.path=a.txt: pydoc reads no file"),
        (
            {"dataset": "pydoc", "split": "test"},
            "evaluation.split=test: must be one of evaluation, calibration",
        ),
        ({"dataset": "c4", "split": "test"}, "evaluation.split=test: must be one of train, validation"),
    ],
)
def test_a_source_that_cannot_be_is_a_config_error(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source(**values)


def test_pydoc_gives_the_topics_of_its_split() -> None:
    corpus = open_corpus(source("pydoc", split="calibration"))
    assert list(corpus.documents) == pydoc_text.topics("calibration")
    assert corpus.provenance["revision"].startswith("python 3.")


def test_a_text_has_the_hash_of_its_documents_joined_by_a_blank_line() -> None:
    assert text_hash(["a", "", "ü"]) == hashlib.sha256("a\n\n\n\nü".encode()).hexdigest()
