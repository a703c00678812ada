"""Faults, one at a time, in a rotated and quantised run: the same command again ends with the same bits.

What Ctrl-C, and a kill in the middle of quantising, do to the command as its user runs it is in test_end_to_end.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint

from jointq_cli.cli.main import main
from jointq_cli.report import load_report
from jointq_cli.system import inventory
from jointq_cli.system.integrity import CONTENTS
from jointq_cli.system.inventory import Entry, entries
from jointq_cli.system.store import Store

STAGES = ["verified", "activations", "rotated", "quantize", "hidden", "scores"]  # that every such run has in its store
WORDS = [
    "quantize", "recipe=ci_smoke", "model.path=model", "output_dir=out", "calibration=text",
    "calibration.path=text.txt", "calibration.num_samples=16", "calibration.seqlen=32", "evaluation=text",
    "evaluation.path=text.txt", "evaluation.seqlen=32", "evaluation.max_windows=8", "quantizer=gptq",
    "quantizer.group_size=32", "qep=none", "rotation=hadamard", "runtime.num_threads=1", "generate_tokens=0",
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder with a model, a text and, once something was run, a store."""

    path: Path

    @property
    def store(self) -> Path:
        return self.path / "out" / "store"

    def run(self, name: str = "run") -> int:
        """In this process, which must be in the folder."""
        return main([*WORDS, f"hydra.run.dir=out/{name}"])

    def start(self, script: str = "", name: str = "run") -> subprocess.Popen[str]:
        """In a process of its own, after `script`."""
        code = f"import sys\n{script}\nfrom jointq_cli.cli.main import main\nsys.exit(main(sys.argv[1:]))"
        return subprocess.Popen(
            [sys.executable, "-c", code, *WORDS, f"hydra.run.dir=out/{name}"],
            cwd=self.path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def bits(self, name: str = "run") -> dict[str, str]:
        """sha256 by file, of the checkpoint and the codes."""
        files = [file for folder in ("checkpoint", "codes") for file in (self.path / "out" / name / folder).iterdir()]
        return {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def artifact(self, stage: str) -> Path:
        [found] = self.store.glob(f"{stage}-*")
        return found

    def reused(self, name: str = "run") -> set[str]:
        stages = load_report(self.path / "out" / name / "report.json").stages
        return {stage.name for stage in stages if stage.reused}


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of a report is tested elsewhere, and takes a second to draw."""
    monkeypatch.setattr("jointq_cli.report.pages.run.run_html", lambda report: "")


def prepare(path: Path) -> Place:
    write_checkpoint(path / "model", "llama_tied")
    (path / "text.txt").write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)}." for n in range(300)))
    return Place(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An undisturbed run. Its store is copied by those who want to damage one."""
    place = prepare(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.path)
        patch.setattr("jointq_cli.report.pages.run.run_html", lambda report: "")
        assert place.run() == 0
    return place


@pytest.fixture
def empty(tmp_path: Path, finished: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same folder before the run."""
    for name in ("model", "text.txt"):
        (tmp_path / name).symlink_to(finished.path / name)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


@pytest.fixture
def place(empty: Place, finished: Place) -> Place:
    """The same folder after the run."""
    shutil.copytree(finished.store, empty.store)
    return empty


# --- damaged artifacts


def largest(artifact: Path) -> Path:
    return max((file for file in artifact.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


HARMS = {
    "verified": [cut, Path.unlink],  # it holds nothing but its list
    **{stage: [flip_a_bit, cut, Path.unlink] for stage in STAGES[1:]},
}
HARMED = [(stage, harm) for stage in STAGES for harm in HARMS[stage]]
QUICK = [("verified", cut), ("rotated", flip_a_bit), ("quantize", cut), ("scores", Path.unlink)]


@pytest.mark.parametrize(
    ("stage", "harm"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in HARMED]
)
def test_a_damaged_artifact_of_any_stage_is_told_and_made_anew(
    stage: str, harm: Callable[[Path], None], place: Place, finished: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = place.artifact(stage)
    harm(largest(artifact))
    assert place.run() == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    [warning] = [line for line in warnings if artifact.name in line]
    assert largest(finished.artifact(stage)).name in warning
    assert place.bits() == finished.bits()
    assert len(place.reused()) == 5 - (stage != "verified")
    same = {file.name: file.read_bytes() for file in finished.artifact(stage).rglob("*.safetensors")}
    assert {file.name: file.read_bytes() for file in artifact.rglob("*.safetensors")} == same


@pytest.mark.slow
def test_all_of_them_damaged_at_once_are_all_made_anew(place: Place, finished: Place) -> None:
    for stage in STAGES:
        cut(largest(place.artifact(stage)))
    assert place.run() == 0
    assert place.bits() == finished.bits()
    assert not place.reused()


def test_a_checkpoint_that_was_edited_in_place_does_not_spread(place: Place, finished: Place) -> None:
    assert place.run("first") == 0
    weights = next(file for file in (place.path / "out/first/checkpoint").glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert place.bits("first") != finished.bits()
    assert place.run("second") == 0
    assert place.bits("second") == finished.bits()


# --- clocks, and others on the same store


def test_a_clock_that_went_back_changes_nothing(place: Place, finished: Place) -> None:
    for path in place.store.rglob("*"):
        os.utime(path, (5e9, 5e9))
    assert place.run() == 0
    assert place.bits() == finished.bits()
    assert place.reused() == {"activations", "rotate", "quantize", "evaluate original", "evaluate quantized"}


def test_somebody_who_prunes_all_the_time_takes_nothing_from_a_run(empty: Place, finished: Place) -> None:
    removed: list[Entry] = []
    done = threading.Event()

    def prune() -> None:
        while not done.wait(0.001):
            found = entries(empty.store)
            removed.extend(inventory.prune(found, 1e18, lambda entry: inventory.remove(empty.store, entry)).removed)

    with Store(empty.store):
        thread = threading.Thread(target=prune)
    thread.start()
    try:
        assert empty.run() == 0
    finally:
        done.set()
        thread.join()
    assert empty.bits() == finished.bits()
    assert main(["store", "prune", "--all", "--store", str(empty.store)]) == 0
    assert not entries(empty.store)


@pytest.mark.slow
def test_two_identical_runs_at_once_share_the_work(empty: Place, finished: Place) -> None:
    runs = [empty.start(name=name) for name in ("one", "two")]
    for process in runs:
        _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
    assert empty.bits("one") == empty.bits("two") == finished.bits()
    assert {entry.stage for entry in entries(empty.store)} == set(STAGES)


# --- kill -9


KILL = """
import os, signal
def kill(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGKILL)
def kill_at(module, name, number=1, only=lambda arguments: True):
    original, seen = getattr(module, name), []
    def counted(*arguments, **settings):
        seen.extend([1] * bool(only(arguments)))
        if len(seen) == number and only(arguments):
            kill()
        return original(*arguments, **settings)
    setattr(module, name, counted)
"""
AT_BAR = """
from jointq_cli.report.console.progress import Phase
kill_at(Phase, "advance", {number}, lambda arguments: arguments[0].name == "{bar}")
"""
AT = """
import importlib; module = importlib.import_module("jointq_cli.{module}")
kill_at(module, "{function}", {number})
"""
BARS = [("activations", 2), ("rotate", 2), ("quantize", 11), ("evaluate", 2), ("evaluate", 5), ("score", 3)]
KILLS = {
    **{f"{bar} {number}": AT_BAR.format(bar=bar, number=number) for bar, number in BARS},
    **{
        f"{stage} {function}": AT.format(module="system.store", function=function, number=number)
        for number, stage in enumerate(STAGES, start=1)
        for function in ("write_contents", "sync_tree")  # the work is done; the list is written
    },
    "links of the run": AT.format(module="system.files", function="_link_or_copy", number=4),
    "audit": AT.format(module="stages.report", function="audit", number=1),
    "report": AT.format(module="system.run_directory", function="write_text_atomically", number=5),
}


@pytest.mark.slow
@pytest.mark.parametrize("point", KILLS)
def test_kill_9_anywhere_on_the_road_changes_nothing(point: str, empty: Place, finished: Place) -> None:
    process = empty.start(f"{KILL}\n{KILLS[point]}")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert not (empty.path / "out" / "run" / "report.html").exists()
    assert empty.run() == 0
    assert empty.bits() == finished.bits()
    assert not [entry for entry in entries(empty.store) if entry.is_partial]


STEPS = {
    "before anything is made": "kill_at(store, 'partial_path')",
    "while it is made": "make = kill",
    "before its list is written": "kill_at(store, 'write_contents')",
    "while its list is written": "kill_at(contents, '_digest', 2)",
    "before it is on disk": "kill_at(store, 'sync_tree')",
    "before it has its name": "kill_at(os, 'rename')",
    "when it has its name": "kill_at(store, 'sync')",
    "before a damaged one is taken away": "kill_at(store, 'delete_locked')",
    "while a damaged one is moved away": "kill_at(os, 'rename')",
    "while a damaged one is deleted": "kill_at(os, 'unlink', 3)",
    "after a damaged one was deleted": "kill_at(store, 'discard_unfinished')",
}
STEP = """
import os, shutil, sys
from pathlib import Path
from jointq_cli.system import integrity as contents; from jointq_cli.system import store
def make(scratch):
    (scratch / "a").write_text("1")
    (scratch / "b").write_text("2")
{kill}
{step}
with store.Store(Path(sys.argv[1])) as opened:
    opened.reuse("stage", "0" * 64, make)
"""


@pytest.mark.parametrize("step", STEPS)
def test_kill_9_at_any_step_of_the_store_leaves_a_whole_artifact_or_none(step: str, tmp_path: Path) -> None:
    def make(scratch: Path) -> None:
        (scratch / "a").write_text("1")
        (scratch / "b").write_text("2")

    if "damaged" in step:
        with Store(tmp_path) as store:
            (store.reuse("stage", "0" * 64, make).path / "a").write_text("x")
    script = STEP.format(kill=KILL, step=STEPS[step])
    killed = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    logged: list[str] = []
    with Store(tmp_path, log=logged.append) as store:
        artifact = store.reuse("stage", "0" * 64, make)
    assert {file.name: file.read_text() for file in artifact.path.iterdir() if file.name != CONTENTS} == {
        "a": "1",
        "b": "2",
    }
    assert artifact.reused == (step == "when it has its name")
    assert bool(logged) == (step in ("before a damaged one is taken away", "while a damaged one is moved away"))
    assert main(["store", "prune", "--all", "--store", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.rglob("*")} == {inventory.MARKER, "partial", "locks"}


# --- disks


def mounted(directory: Path, *options: str) -> bool:
    return (
        shutil.which("mount") is not None
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", directory], capture_output=True
        ).returncode
    )


@pytest.fixture
def disk(empty: Place, finished: Place) -> Iterator[Callable[[str], None]]:
    """A disk of its own for the store and the runs; called, it changes its options."""
    directory = empty.path / "out"
    directory.mkdir()
    if not mounted(directory, "size=100k"):
        pytest.skip("needs the right to mount a small tmpfs")
    yield lambda option: subprocess.run(["mount", "-o", f"remount,{option}", directory], check=True) and None
    subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.parametrize("kilobytes", [300, *(pytest.param(size, marks=pytest.mark.slow) for size in (100, 600, 900))])
def test_a_full_disk_loses_nothing_and_with_room_the_run_goes_on(
    kilobytes: int, disk: Callable[[str], None], empty: Place, finished: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    disk(f"size={kilobytes}k")
    assert empty.run() == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "the disk is full" in err
    made = {entry.name for entry in entries(empty.store) if not entry.is_partial}
    disk("size=100m")
    assert empty.run() == 0
    assert empty.bits() == finished.bits()
    assert made <= {entry.name for entry in entries(empty.store)}


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [1, 40, 150])
def test_a_file_that_may_not_grow_is_a_full_disk(
    kilobytes: int, empty: Place, finished: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, before[1]))
    try:
        assert empty.run() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "the disk is full" in capsys.readouterr().err
    assert empty.run() == 0
    assert empty.bits() == finished.bits()


def test_a_read_only_store_still_serves_what_it_has(
    disk: Callable[[str], None], empty: Place, finished: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    disk("size=100m")
    shutil.copytree(finished.store, empty.store)
    disk("ro")
    elsewhere = [f"hydra.run.dir={empty.path}/elsewhere"]
    assert main([*WORDS, *elsewhere]) == 0
    assert main(["store", "ls", "--store", str(empty.store)]) == 0
    assert not capsys.readouterr().err
    assert main([*WORDS, "quantizer.bits=3", *elsewhere]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "cannot be written (Read-only file system)" in err
    disk("rw")
    assert empty.run() == 0
    assert empty.bits() == finished.bits()


@pytest.mark.slow
def test_two_sweeps_at_once_share_their_jobs_and_end_with_the_same_bits(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "jointq_cli", "quantize", "-m", "recipe=ci_smoke", "quantizer.bits=4,3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(words, cwd=tmp_path, **pipes) for _ in range(2)]
    outputs, errors = zip(*(process.communicate(timeout=600) for process in both), strict=True)
    assert [process.returncode for process in both] == [0, 0], (outputs, errors)
    assert any("another process runs it" in text for text in errors)
    [sweep] = (tmp_path / "runs" / "ci_smoke").iterdir()
    table = json.loads((sweep / "summary.json").read_text())
    assert [row["state"] for row in table] == ["done", "done"]
    rows = [[line for line in text.splitlines() if line.startswith(("  0", "  1"))] for text in outputs]
    assert rows[0] == rows[1]  # figures and times: each job was run by one of them


# --- activations that overflow


def scale_weight(model: Path, name: str, factor: float) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name] * factor
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def overflowing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Path]:
    """Scales one weight of a small float32 model, so that float16 is too narrow."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)

    def make(name: str, factor: float) -> Path:
        scale_weight(write_checkpoint(tmp_path / "model"), name, factor)
        return tmp_path / "model"

    return make


@pytest.mark.parametrize(
    ("weight", "factor", "place"),
    [
        ("model.layers.1.mlp.up_proj.weight", 1.5e4, "model.layers.1"),
        ("model.layers.1.mlp.down_proj.weight", 1.5e5, "after block 1 (model.layers.1)"),
        ("model.embed_tokens.weight", 1e6, "the embeddings"),  # infinite in float16
    ],
)
@pytest.mark.parametrize("solver", [["quantizer=gptq"], ["quantizer=jointq", "qep=full"]])
def test_an_overflow_is_reported_with_block_dtype_and_key(
    overflowing: Callable[[str, float], Path],
    capsys: pytest.CaptureFixture[str],
    weight: str,
    factor: float,
    place: str,
    solver: list[str],
) -> None:
    overflowing(weight, factor)
    assert main([*WORDS, "rotation=none", *solver, "quantizer.group_size=32", "runtime.dtype=float16"]) == 1
    [line] = [text for text in capsys.readouterr().err.splitlines() if text]
    assert place in line
    assert "NaN or Inf in float16" in line
    assert "use runtime.dtype=bfloat16 or runtime.dtype=float32" in line


def test_an_evaluation_whose_activations_overflow_fails(
    overflowing: Callable[[str, float], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    overflowing("model.layers.2.mlp.down_proj.weight", 1.5e5)
    words = [word for word in WORDS if word.startswith(("evaluation", "model.path"))]
    assert main(["evaluate", *words, "output_dir=out", "runtime.dtype=float16"]) == 1
    assert "after block 2 (model.layers.2) hold NaN or Inf in float16" in capsys.readouterr().err


def test_logits_that_overflow_are_a_problem_of_the_evaluation(
    overflowing: Callable[[str, float], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    overflowing("lm_head.weight", 1e6)
    words = [word for word in WORDS if word.startswith(("evaluation", "model.path"))]
    assert main(["evaluate", *words, "output_dir=out", "runtime.dtype=float16"]) == 1
    err = capsys.readouterr().err
    assert "the perplexity is nan in float16; try runtime.dtype=float32; see " in err
