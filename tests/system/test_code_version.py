"""An edit changes the keys of the stages whose code it can reach, and keeps all other artifacts."""

import ast
import shutil
from pathlib import Path

import pytest

from jointq_cli.system import code_version
from jointq_cli.system.code_version import PACKAGE, SourceTree

STAGES = ("text_tokens", "activations", "rotate", "hessians", "quantize", "hidden", "scores", "quantized_scores")
QUANTIZERS = {"GPTQ": "gptq", "JointQ": "jointq.quantizer", "RTN": "rtn"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this package, to be edited."""
    target = tmp_path_factory.mktemp("copy") / "jointq_cli"
    return shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def before(copy: Path) -> dict[str, str]:
    return versions(copy)


def versions(root: Path) -> dict[str, str]:
    """By stage, and of the quantize stage by quantizer."""
    tree = SourceTree(root)
    found = {stage: tree.version([f"jointq_cli.stages.{stage}"]) for stage in STAGES}
    for name, module in QUANTIZERS.items():
        code = ["jointq_cli.stages.quantize", f"jointq_cli.quantization.quantizers.{module}"]
        found[name] = tree.version(code)
    return found


def changed_by(file: str, copy: Path, before: dict[str, str]) -> set[str]:
    """What an edit of this file changes."""
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content + b"\n# edited\n")
    after = versions(copy)
    (copy / file).write_bytes(content)
    return {name for name, version in after.items() if version != before[name]}


@pytest.mark.parametrize(
    "file",
    [
        "__init__.py", "cli/main.py", "cli/commands/store.py", "errors.py", "pipeline.py", "recipe.py",
        "report/__init__.py", "report/console/console.py", "report/pages/documents.py", "stages/base.py",
        "stages/loop_settings.py", "stages/plan/costs.py", "stages/report.py", "system/store.py", "system/inventory.py",
    ],
)  # fmt: skip
def test_an_edit_of_what_shows_plans_or_orchestrates_keeps_every_artifact(
    file: str, copy: Path, before: dict[str, str]
) -> None:
    assert changed_by(file, copy, before) == set()


FROM_HESSIANS = {"hessians", "quantize", "quantized_scores", *QUANTIZERS}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("kernels/cpu.py", {"JointQ", "GPTQ"}),
        ("quantization/loop.py", {"quantize", "quantized_scores", *QUANTIZERS}),
        ("quantization/collector.py", FROM_HESSIANS),
        ("quantization/quantizers/jointq/search.py", {"JointQ"}),
        ("quantization/quantizers/gptq.py", {"GPTQ", "JointQ"}),
        ("transforms/basis.py", {"rotate"}),
        ("transforms/activation_samples.py", {"activations", "rotate"}),
        ("evaluation/perplexity.py", {"scores", "quantized_scores"}),
        ("data/calibration.py", {"text_tokens"}),
        ("models/checkpoint.py", {*STAGES, *QUANTIZERS} - {"text_tokens"}),
        ("stages/hidden.py", {"hidden", "scores", "quantized_scores"}),
    ],
)
def test_an_edit_of_what_computes_changes_the_keys_of_what_it_computes(
    file: str, expected: set[str], copy: Path, before: dict[str, str]
) -> None:
    changed = changed_by(file, copy, before)
    assert expected <= changed
    untouched = {"text_tokens", "hidden", "activations"} - expected
    assert not changed & untouched


def test_a_new_import_is_followed_also_inside_a_function(tmp_path: Path) -> None:
    files = {
        "stage.py": "import pack.one\n\n\ndef make():\n    from pack.inner import two, NAME\n",
        "one.py": "import os\n",
        "inner/__init__.py": "from pack.report import show\nNAME = 1\n",
        "inner/two.py": "from pack.inner.three import THREE\n",
        "inner/three.py": "",
        "report/__init__.py": "from pack.unseen import x\n",
        "unseen.py": "",
    }
    for name, text in files.items():
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pack" / name).write_text(text)
    tree = SourceTree(tmp_path / "pack")
    assert tree.imported_by(["pack.stage"]) == ["inner", "inner.three", "inner.two", "one", "stage"]
    assert tree.version(["pack.stage", "somewhere.else"]) == tree.version(["pack.stage"])


def test_no_file_is_parsed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    parse = ast.parse

    def counting(source: bytes) -> ast.Module:
        parsed.append(source)
        return parse(source)

    monkeypatch.setattr(code_version.ast, "parse", counting)
    tree = SourceTree(PACKAGE)
    for _ in range(2):
        for stage in STAGES:
            tree.version([f"jointq_cli.stages.{stage}"])
    assert len(parsed) == len(tree.imported_by([f"jointq_cli.stages.{stage}" for stage in STAGES]))


def test_modules_that_are_neutral_exist() -> None:
    """A room that is renamed must be renamed here too."""
    names = [name.replace(".", "/") for name in code_version.NEUTRAL]
    assert [n for n in names if not ((PACKAGE / n).is_dir() or (PACKAGE / f"{n}.py").is_file())] == []


def test_versions_of_libraries_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SourceTree(PACKAGE).version(["jointq_cli.stages.text_tokens"])
    monkeypatch.setattr(code_version, "version", lambda library: "0")
    assert SourceTree(PACKAGE).version(["jointq_cli.stages.text_tokens"]) != before


def test_a_library_that_is_missing_counts_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SourceTree(PACKAGE).version(["jointq_cli.stages.text_tokens"])
    monkeypatch.setattr(code_version, "LIBRARIES", ("torch", "transformers", "no-such-library"))
    assert SourceTree(PACKAGE).version(["jointq_cli.stages.text_tokens"]) != before
