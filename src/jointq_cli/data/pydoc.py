"""The English text in a Python installation, as calibration, evaluation and training documents.

There are two sources: the language reference that `help()` shows (`pydoc_data.topics`) and the docstrings of installed
Python files, which are parsed, not imported. The topics are divided into splits such that no long paragraph of one
split occurs in another. Never opens a network connection.

The split of a topic depends on its name alone, so Python 3.11, 3.12 and 3.13 agree on it, although the text of a topic
differs a little between them. Numbers are comparable within one Python version.
"""

import ast
import hashlib
import importlib.metadata
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics as _topics
from typing import Final

SPLITS: Final = ("evaluation", "calibration", "train")

# The salt was chosen for the sizes of the splits alone, before any model existed: they have 16, 28 and 35 of
# 79 topics and about 24 %, 30 % and 44 % of their characters (a topic has 200 to 62 000 characters).
_SALT: Final = "jointq:"
_EVALUATION_BELOW: Final = 0.2
_CALIBRATION_BELOW: Final = 0.5

# Headings, "Returns:" and the like occur everywhere; only a longer paragraph identifies a text.
LEAK_LENGTH: Final = 40

# The dependencies of torch, transformers and datasets, plus numba. They are listed so that an unrelated package in
# the same environment changes nothing. sympy, mpmath and pandas are excluded: their docstrings are mostly printed
# formulas and tables, 8 MB of them, which would take much of a small model's capacity.
DISTRIBUTIONS: Final = (
    "accelerate",
    "click",
    "datasets",
    "filelock",
    "fsspec",
    "huggingface_hub",
    "hydra-core",
    "Jinja2",
    "networkx",
    "numba",
    "numpy",
    "omegaconf",
    "packaging",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "urllib3",
)

_SKIPPED_FOLDERS: Final = frozenset({"site-packages", "test", "tests", "idlelib", "__pycache__"})
_PARAGRAPH_BREAK: Final = re.compile(r"\n[ \t]*\n")
_WORD: Final = re.compile(r"\w+")


def split_of(name: str) -> str:
    """The split of the topic with this name."""
    digest = hashlib.sha256((_SALT + name).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < _EVALUATION_BELOW:
        return "evaluation"
    return "calibration" if position < _CALIBRATION_BELOW else "train"


def topics(split: str) -> list[str]:
    """The topics of one split in the order of their names, without paragraphs that occur in an earlier split.

    Topics quote each other at length: "typesseq" contains all of "typesseq-mutable". The evaluation split is
    complete, calibration lacks the paragraphs of evaluation, and train lacks those of both.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    earlier = SPLITS[: SPLITS.index(split)]
    guarded = _fingerprints(text for name in earlier for text in _topics_of(name))
    return [kept for text in _topics_of(split) if (kept := _without(text, guarded))]


def docstrings(distributions: Sequence[str] = DISTRIBUTIONS) -> list[str]:
    """The docstrings of the standard library, then of the distributions, one document per Python file.

    Each docstring is indented under the name it documents, as in the topics. Repeated docstrings are skipped, and so
    are files that this Python cannot parse. Raises `importlib.metadata.PackageNotFoundError` for a distribution that
    is not installed, so that the corpus cannot shrink silently.
    """
    seen: set[str] = set()
    files = [*_standard_library(), *(path for name in distributions for path in _files_of(name))]
    return [page for path in files if (page := _page(path, seen))]


def training_documents(distributions: Sequence[str] = DISTRIBUTIONS) -> list[str]:
    """The training documents: the train topics, then the docstrings, without repeated long paragraphs.

    Long paragraphs of an evaluation or calibration topic are removed, whatever their spacing, letter case and
    punctuation. So are repetitions: "input_ids: indices of input sequence tokens ..." occurs in hundreds of files
    and would be most of what a small model learns.
    """
    seen = _fingerprints(text for name in ("evaluation", "calibration") for text in _topics_of(name))
    documents = (*topics("train"), *docstrings(distributions))
    return [kept for text in documents if (kept := _without(text, seen, remember=True))]


def paragraphs(text: str) -> list[str]:
    """The blocks between blank lines, indentation included."""
    return [block.strip("\n") for block in _PARAGRAPH_BREAK.split(text) if block.strip()]


def fingerprint(paragraph: str) -> str | None:
    """A string that is equal for all copies of a paragraph; None if it is too short to identify a text."""
    if len(" ".join(paragraph.split())) <= LEAK_LENGTH:
        return None
    # A line of punctuation has no words, so all such lines count as the same paragraph.
    return " ".join(_WORD.findall(paragraph.casefold()))


def _topics_of(split: str) -> Iterator[str]:
    """The unfiltered topics of a split, in the order of their names."""
    return (_topics[name] for name in sorted(_topics) if split_of(name) == split)


def _fingerprints(texts: Iterable[str]) -> set[str]:
    found = (fingerprint(block) for text in texts for block in paragraphs(text))
    return {mark for mark in found if mark is not None}


def _without(text: str, marks: set[str], *, remember: bool = False) -> str:
    """The text without the paragraphs in `marks`; with `remember`, the remaining ones are added to `marks`."""
    kept = []
    for block in paragraphs(text):
        mark = fingerprint(block)
        if mark in marks:
            continue
        if remember and mark is not None:
            marks.add(mark)
        kept.append(block)
    return "\n\n".join(kept) + "\n" if kept else ""


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(found) if _SKIPPED_FOLDERS.isdisjoint(path.parts)]


def _files_of(distribution: str) -> list[Path]:
    found = importlib.metadata.distribution(distribution).files or []
    python = (path for path in found if path.suffix == ".py" and _SKIPPED_FOLDERS.isdisjoint(path.parts))
    return [Path(str(path.locate())) for path in sorted(python)]


def _page(path: Path, seen: set[str]) -> str:
    """One file's docstrings that are not in `seen`, as text; adds them to `seen`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in other packages
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ""
    entries = []
    for title, text in _documented(tree, ""):
        if text in seen:
            continue
        seen.add(text)
        body = "\n".join(f"   {line}" if line else "" for line in text.splitlines()) if title else text
        entries.append(f"{title}\n\n{body}" if title else body)
    return "\n\n".join(entries) + "\n" if entries else ""


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module and its definitions, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = (ast.get_docstring(node) or "").strip()
        if text:
            yield _heading(node, prefix), text
        if isinstance(node, ast.ClassDef):
            prefix = f"{prefix}{node.name}."
        elif not isinstance(node, ast.Module):
            return  # local definitions of a function are not documentation
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _documented(child, prefix)


def _heading(node: ast.AST, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}({bases})" if bases else f"class {prefix}{node.name}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in (*every, node.args.vararg, node.args.kwarg):
            if argument is not None:
                argument.annotation = None  # the topics show signatures without types
        return f"{prefix}{node.name}({ast.unparse(node.args)})"
    return ""
