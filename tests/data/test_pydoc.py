"""What the bundled text promises: shares that agree everywhere and leak nothing into each other."""

import importlib.metadata
import re
from pathlib import Path
from pydoc_data.topics import topics as raw_topics

import pytest

from jointq_cli.data import pydoc as pydoc_text

# Small enough to parse in a second; the whole library takes half a minute and adds no case.
FEW_FILES = ("collections/__init__.py", "contextlib.py", "functools.py", "string.py", "types.py")


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    every = pydoc_text._standard_library()
    few = [path for path in every if path.as_posix().endswith(FEW_FILES)]
    monkeypatch.setattr(pydoc_text, "_standard_library", lambda: few)


def install(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Make these files the whole standard library."""
    monkeypatch.setattr(pydoc_text, "_standard_library", lambda: list(paths))


def normalised(text: str) -> str:
    return " ".join(text.split())


def long_paragraphs(texts: list[str]) -> set[str]:
    """Written apart from the module's own fingerprints, so that a mistake there shows here."""
    blocks = (normalised(block) for text in texts for block in re.split(r"\n\s*\n", text))
    return {block for block in blocks if len(block) > pydoc_text.LEAK_LENGTH}


def raw_share(split: str) -> list[str]:
    return [text for name, text in raw_topics.items() if pydoc_text.split_of(name) == split]


def test_every_topic_is_in_exactly_one_share() -> None:
    shares = {name: pydoc_text.split_of(name) for name in raw_topics}
    assert set(shares.values()) == set(pydoc_text.SPLITS)
    assert sum(len(raw_share(split)) for split in pydoc_text.SPLITS) == len(raw_topics)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("compound", "evaluation"),
        ("strings", "evaluation"),
        ("lambda", "evaluation"),
        ("types", "calibration"),
        ("typesseq", "calibration"),
        ("specialnames", "train"),
        ("with", "train"),
        ("import", "train"),
    ],
)
def test_the_share_of_a_topic_never_changes(name: str, split: str) -> None:
    # Moving a topic makes every perplexity that was ever published incomparable.
    assert pydoc_text.split_of(name) == split


def test_the_shares_have_about_the_promised_sizes() -> None:
    total = sum(map(len, raw_topics.values()))
    parts = {split: sum(map(len, raw_share(split))) / total for split in pydoc_text.SPLITS}
    assert parts["evaluation"] == pytest.approx(0.2, abs=0.1)
    assert parts["calibration"] == pytest.approx(0.3, abs=0.1)
    assert parts["train"] == pytest.approx(0.5, abs=0.1)


def test_evaluation_topics_are_complete() -> None:
    served = normalised(" ".join(pydoc_text.topics("evaluation")))
    names = sorted(name for name in raw_topics if pydoc_text.split_of(name) == "evaluation")
    assert served == normalised(" ".join(raw_topics[name] for name in names))


@pytest.mark.parametrize(
    ("split", "held_out"),
    [
        ("calibration", ("evaluation",)),
        ("train", ("evaluation", "calibration")),
    ],
)
def test_a_share_has_no_paragraph_of_an_earlier_share(split: str, held_out: tuple[str, ...]) -> None:
    mine = long_paragraphs(pydoc_text.topics(split))
    for other in held_out:
        theirs = long_paragraphs(raw_share(other))
        assert mine
        assert theirs
        assert not mine & theirs


def test_topics_do_quote_each_other_across_shares() -> None:
    """The guard has something to do: without it the shares would leak."""
    assert long_paragraphs(raw_share("train")) & long_paragraphs(raw_share("evaluation"))
    assert long_paragraphs(raw_share("calibration")) & long_paragraphs(raw_share("evaluation"))


@pytest.mark.parametrize("split", pydoc_text.SPLITS)
def test_topics_come_out_the_same_twice_and_none_is_empty(split: str) -> None:
    first = pydoc_text.topics(split)
    assert first == pydoc_text.topics(split)
    assert all(text.strip() for text in first)


def test_a_wrong_split_name_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="'test': one of evaluation, calibration, train"):
        pydoc_text.topics("test")


def test_training_documents_have_no_paragraph_that_is_held_out(small_library: None) -> None:
    trained = long_paragraphs(pydoc_text.training_documents(("packaging",)))
    held_out = long_paragraphs([*raw_share("evaluation"), *raw_share("calibration")])
    assert len(trained) > 300
    assert not trained & held_out


@pytest.mark.parametrize("split", ["evaluation", "calibration"])
def test_a_docstring_that_quotes_a_held_out_topic_loses_the_quotation(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quotation = next(
        block
        for block in pydoc_text.paragraphs(pydoc_text.topics(split)[0])
        if len(normalised(block)) > 100 and '"""' not in block and "\\" not in block
    )
    # Rewrapped, in capitals and with other quotes: still the same paragraph.
    rewrapped = "\n    ".join(quotation.upper().replace('"', "``").split())
    own = "Another paragraph, that nobody has written in the reference."
    source = f'"""A module.\n\n{rewrapped}\n\n{own}"""\n'
    path = tmp_path / "quoting.py"
    path.write_text(source, encoding="utf-8")
    install(monkeypatch, path)
    documents = pydoc_text.training_documents(())
    assert documents[-1] == f"A module.\n\n{own}\n"


def test_no_long_paragraph_is_trained_on_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = "A paragraph which many files repeat about their arguments, word for word."
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f'"""File {name}.\n\n{repeated}\n"""\n', encoding="utf-8")
    install(monkeypatch, tmp_path / "a.py", tmp_path / "b.py")
    assert pydoc_text.training_documents(())[-2:] == [f"File a.\n\n{repeated}\n", "File b.\n"]


def test_docstrings_stand_under_the_name_that_they_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shapes.py"
    path.write_text(
        '"""Shapes."""\n'
        "class Square(Shape):\n"
        '    """A square.\n\n    It has sides.\n    """\n'
        "    async def grow(self, by: int = 2, *, slowly: bool = False) -> None:\n"
        '        """Make it larger."""\n'
        "        def helper():\n"
        '            """Not documentation."""\n'
        "if True:\n"
        "    def area(shape): 'Return the area.'\n",
        encoding="utf-8",
    )
    install(monkeypatch, path)
    assert pydoc_text.docstrings(()) == [
        "Shapes.\n\n"
        "class Square(Shape)\n\n   A square.\n\n   It has sides.\n\n"
        "Square.grow(self, by=2, *, slowly=False)\n\n   Make it larger.\n\n"
        "area(shape)\n\n   Return the area.\n"
    ]


def test_a_docstring_is_kept_once_and_a_broken_file_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text('"""The same words."""\n', encoding="utf-8")
    (tmp_path / "b.py").write_text('"""The same words."""\n', encoding="utf-8")
    (tmp_path / "c.py").write_text("def broken(:\n", encoding="utf-8")
    (tmp_path / "d.py").write_bytes(b'"""Not UTF-8: \xff."""\n')
    install(monkeypatch, *(tmp_path / f"{name}.py" for name in "abcd"))
    assert pydoc_text.docstrings(()) == ["The same words.\n"]


def test_docstrings_come_out_the_same_twice(small_library: None) -> None:
    assert pydoc_text.docstrings(("packaging",)) == pydoc_text.docstrings(("packaging",))


def test_the_standard_library_is_read_without_tests_and_without_site_packages() -> None:
    files = pydoc_text._standard_library()
    assert any(path.name == "functools.py" for path in files)
    skipped = {"site-packages", "test", "tests", "idlelib"}
    assert not [path for path in files if skipped & set(path.parts[-4:])]
    assert files == sorted(files, key=lambda path: path.parts)


def test_a_distribution_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        pydoc_text.docstrings(("no-such-distribution-anywhere",))


def test_reading_docstrings_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "explosive.py"
    path.write_text('"""Documented."""\nraise SystemExit("it was run")\n', encoding="utf-8")
    install(monkeypatch, path)
    assert pydoc_text.docstrings(()) == ["Documented.\n"]
