"""The words after `jointq`: dispatch, help, errors in one line, completion, sweeps. No model is touched."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from jointq_cli import __version__
from jointq_cli.cli import config_files
from jointq_cli.cli.commands import completion, help
from jointq_cli.cli.compose import Job, launch
from jointq_cli.cli.config_errors import UsageError
from jointq_cli.cli.early_check import check_early
from jointq_cli.cli.hydra_main import complete
from jointq_cli.cli.main import COMMANDS, COMPOSED, main
from jointq_cli.errors import ConfigError, Interrupted, NumericsError
from jointq_cli.quantization.quantizers import GPTQ, RTN, JointQ, Quantizer
from jointq_cli.recipe import RECIPES, Recipe, concrete, keys
from jointq_cli.system.run_directory import claimed


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def jobs() -> list[tuple[Any, Job]]:
    """What a task has been given, in order."""
    return []


def run(words: str, jobs: list[tuple[Any, Job]]) -> int:
    command, *arguments = words.split()
    return launch(command, arguments, lambda recipe, job: jobs.append((recipe, job)))


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "jointq_cli", "recipes"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("launcher", ["basic", "joblib", "processes"])
def test_launchers_of_hydra_and_of_plugins_are_left_to_hydra(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_early("quantize", ["quantizer.bits=3,4", f"hydra/launcher={launcher}"], ["-m"])
    assert "loading PyTorch" in capsys.readouterr().out


# --- help


def loaded_by(words: str) -> set[str]:
    """Top-level modules that are loaded after `jointq WORDS`."""
    script = (
        "import contextlib, sys\n"
        "from jointq_cli.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(sys.argv[1:])\n"  # argparse leaves after its help
        "print('\\n' + ' '.join({m.split('.')[0] for m in sys.modules}))"
    )
    command = [sys.executable, "-c", script, *words.split()]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "quantize --help",
        "compare --help",
        "compare nowhere",
        "recipes",
        "store ls",
        "store ls --store nowhere",
        "quantise",
    ],
)
def test_what_needs_no_config_loads_neither_torch_nor_hydra(words: str) -> None:
    assert not loaded_by(words) & {
        "torch",
        "hydra",
        "omegaconf",
        "transformers",
        "matplotlib",
        "jinja2",
        "numpy",
    }


def test_completion_loads_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "jointq quantize recipe=po")
    assert not loaded_by("-sc query=bash") & {"torch", "transformers"}


@pytest.mark.parametrize("word", ["quantizer=nosuch", "quantizer.bits=["])
def test_an_unknown_option_and_an_unreadable_word_are_told_without_torch(word: str) -> None:
    assert "torch" not in loaded_by(f"quantize {word}")


def test_a_value_out_of_range_is_told_without_transformers() -> None:
    heavy = {"transformers", "datasets", "numba", "matplotlib", "jinja2", "sympy", "scipy"}
    assert not loaded_by("quantize quantizer.bits=99") & heavy


def test_the_first_line_stands_before_torch_is_loaded() -> None:
    script = (
        "import sys\n"
        "class Refused:\n"
        "    def find_spec(name, *more): assert name != 'torch'\n"
        "sys.meta_path.insert(0, Refused)\n"
        "from jointq_cli.cli.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "quantize", "recipe=pocket_w3g128"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "jointq quantize pocket_w3g128: loading PyTorch and transformers\n"
    assert done.stderr.splitlines()[-1] == "AssertionError"


def test_no_arguments_and_help_give_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    assert all(name in bare for name in COMMANDS)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jointq {__version__}\n"


@pytest.mark.parametrize("command", COMPOSED)
def test_the_help_of_a_command_names_every_option_of_its_groups(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert main(["help", command]) == 0
    assert capsys.readouterr().out == shown
    for group in help.GROUPS[command]:
        names = config_files.options(group)
        assert len(names) < 2 or all(f"    {name} " in shown for name in names)
    assert "\n  output_dir=runs " in shown
    assert ("\n  export=null " in shown) == (command in ("quantize", "plan"))


def test_the_first_line_names_the_recipe_and_the_words_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    check_early("quantize", ["quantizer.grid=q4_k", "recipe=pocket_w3g128"], [])
    check_early("evaluate", ["model.path=x"], [])
    assert capsys.readouterr().out == (
        "jointq quantize pocket_w3g128 quantizer.grid=q4_k: loading PyTorch and transformers\n"
        "jointq evaluate model.path=x: loading PyTorch and transformers\n"
    )


@pytest.mark.parametrize("command", COMPOSED)
def test_every_example_of_a_help_text_composes(command: str, jobs: list[tuple[Any, Job]]) -> None:
    examples = [line.split("   ")[0] for line in map(str.strip, help.OPENINGS[command].splitlines())]
    examples = [line.removeprefix("jointq ") for line in examples if line.startswith(f"jointq {command}")]
    assert len(examples) >= 1
    for example in examples:
        assert run(example, jobs) == 0
    assert len(jobs) >= len(examples)


# --- errors in one line

MISTAKES = {
    "quantize recipe=pocket_w4g12": (
        1,
        "recipe=pocket_w4g12: did you mean pocket_w4g128? It must be one of ci_",
    ),
    "quantize recipe=my.yaml": (
        1,
        "recipe=my.yaml: no such option; a recipe of your own is a file FOLDER/recipe/my.yaml, given by --config-dir",
    ),
    "quantize my.yaml": (1, "my.yaml: settings are written KEY=VALUE; a recipe of your own is a file FOLDER/recipe/my"),
    "quantize model=org/name": (
        1,
        "model=org/name: no such option; a directory, a GGUF file or a hub id is named by model.path=org/name",
    ),
    "quantize model=/tmp/name": (
        1,
        "model=/tmp/name: no such option; a directory, a GGUF file or a hub id is named by",
    ),
    "quantize model=name": (1, "model=name: must be one of checkpoint, "),
    "quantize org/name": (1, "org/name: settings are written KEY=VALUE; a model is named by model.path=org/name"),
    "quantize calibration=my.txt": (
        1,
        "calibration=my.txt: no such option; a file is named by calibration=text calibration.path=my.txt",
    ),
    "quantize sweep=bits": (1, "sweep=bits: a sweep is added to the recipe with a plus, and needs -m: -m +sweep=bits"),
    "quantize model.path=a(1)": (
        1,
        "model.path=a(1): cannot be read; quote a value that has spaces, quotes or brackets: 'model.path=\"a(1)\"'",
    ),
    "quantize model.path=a,b": (
        1,
        "model.path=a,b: several values make a sweep, which needs --multirun (-m); a list is written [a,b], and one "
        "text with a comma 'model.path=\"a,b\"'",
    ),
    "quantize quantizer=gtpq": (1, "quantizer=gtpq: did you mean gptq? It must be one of "),
    "quantize quantizer.bit=4": (1, "no such key quantizer.bit; did you mean quantizer.bits?"),
    "quantize quantiser.bits=4": (1, "no such key quantiser.bits; did you mean quantizer.bits?"),
    "quantize quantiser=gptq": (1, "no such key quantiser; did you mean quantizer?"),
    "quantize bits=3": (1, "no such key bits; did you mean quantizer.bits?"),
    "quantize foo=1": (1, "no such key foo; there are name, description, model, calibration, layers,"),
    "quantize +quantizer.foo=1": (
        1,
        "no such key quantizer.foo; there are quantizer.bits, quantizer.group_size",
    ),
    "quantize quantizer=rtn quantizer.damping=0.1": (
        1,
        "no such key quantizer.damping with RTN: it belongs to GPTQ",
    ),
    "quantize quantizer=rtn +quantizer.damping=0.1": (
        1,
        "no such key quantizer.damping with RTN: it belongs to GPTQ",
    ),
    "quantize quantizer.bits=four": (1, "quantizer.bits=four: must be an integer"),
    "quantize quantizer.bits=3.5": (1, "quantizer.bits=3.5: must be an integer"),
    "quantize quantizer.bits=null": (1, "quantizer.bits=null: must be an integer"),
    "quantize quantizer.group_size=big": (1, "quantizer.group_size=big: must be an integer or null"),
    "quantize quantizer=gptq quantizer.mse=maybe": (1, "quantizer.mse=maybe: must be true or false"),
    "quantize quantizer=gptq quantizer.damping=some": (1, "quantizer.damping=some: must be a number"),
    "quantize quantizer.enable_schur=maybe": (1, "quantizer.enable_schur=maybe: must be true or false"),
    "quantize quantizer.gptq.damping=some": (1, "quantizer.gptq.damping=some: must be a number"),
    "quantize quantizer.lambda_mode=incremental_lambda": (
        1,
        "quantizer.regularization_mode=diagonal: lambda_mode=incremental_lambda works with identity only",
    ),
    "quantize quantizer.lambda_mode=heldout quantizer.lambda_list=[]": (
        1,
        "quantizer.lambda_list=[]: lambda_mode=heldout needs at least one value",
    ),
    "quantize quantizer.lambda_mode=heldout quantizer.lambda_list=[0.2,0.1]": (
        1,
        "quantizer.lambda_list=[0.2, 0.1]: must rise from value to value",
    ),
    "quantize quantizer.lambda_list=0.1": (1, "quantizer.lambda_list=0.1: must be a list of numbers, such as [1,2]"),
    "quantize quantizer.lambda_list=[a]": (1, "quantizer.lambda_list=[a]: must be a list of numbers, such as [1,2]"),
    "quantize quantizer.batch_size=0": (1, "quantizer.batch_size=0: must be at least 1"),
    "quantize quantizer.heldout_share=1": (1, "quantizer.heldout_share=1.0: must be above 0 and below 1"),
    "quantize quantizer.gptq.damping=-1": (1, "quantizer.gptq.damping=-1.0: must be at least 0"),
    "quantize quantizer.gptq.block=3": (
        1,
        "no such key quantizer.gptq.block; did you mean quantizer.gptq.block_size?",
    ),
    "quantize quantizer.actorder=true": (1, "no such key quantizer.actorder; did you mean quantizer.act_order?"),
    "quantize quantizer.enable_schur=false": (1, "quantizer.enable_schur=false: one start is needed, of enable_schur,"),
    "quantize quantizer.ils_enabled=true quantizer.max_sweeps=0": (
        1,
        "quantizer.max_sweeps=0: ils_enabled=true needs at least 1",
    ),
    "quantize quantizer.lambda_mode=best": (
        1,
        "quantizer.lambda_mode=best: must be one of fixed_lambda, incremental_lambda, heldout",
    ),
    "quantize quantizer.regularization_lambda=-1": (
        1,
        "quantizer.regularization_lambda=-1.0: must be at least 0 and finite",
    ),
    "quantize activations.layer_bits=3": (1, "activations.layer_bits=3: must be a dictionary, such as {a:1}"),
    "quantize activations.layer_bits.o_proj=8": (
        1,
        "no entry activations.layer_bits.o_proj yet; add it with a plus: +activations.layer_bits.o_proj=VALUE",
    ),
    "quantize model.path=[1,2]": (1, "model.path=[1,2]: must be text"),
    "quantize layers.exclude_layer_names=lm_head": (
        1,
        "layers.exclude_layer_names=lm_head: must be a list, such as [a,b]",
    ),
    "quantize layers.overrides={q_proj:{bits:9}}": (1, "layers.overrides.q_proj.bits=9: must be from 1 to 8"),
    "quantize layers.overrides={re:(:keep}": (
        1,
        "layers.overrides={re:(:keep}: cannot be read; a backslash goes before each of : = ( ) [ ] { } in a ",
    ),
    "quantize quantizer.bits=0": (1, "quantizer.bits=0: must be from 1 to 8"),
    "quantize quantizer.bits=9": (1, "quantizer.bits=9: must be from 1 to 8"),
    "quantize quantizer.on_failure=shrug": (1, "quantizer.on_failure=shrug: must be"),
    "quantize calibration.strategy=best": (1, "calibration.strategy=best: must be one of concat_chunk,"),
    "quantize runtime.dtype=int8": (1, "runtime.dtype=int8: must be one of auto, float32,"),
    "quantize model=checkpoint": (1, "model.path: has no value; give one with model.path=..."),
    "quantize calibration=text": (1, "calibration.path: has no value; give one with calibration.path=..."),
    "quantize pocket_w3g128": (
        1,
        "pocket_w3g128: settings are written KEY=VALUE; did you mean recipe=pocket_w3g128?",
    ),
    "quantize quantizer.bits=3,4": (
        1,
        "quantizer.bits=3,4: several values make a sweep, which needs --multirun (-m)",
    ),
    "quantize quantizer=null": (1, "quantizer=null: a group needs one of its options"),
    "quantize ~quantizer.bits": (1, "~quantizer.bits: cannot be removed from a recipe"),
    "quantize quantizer.bits=${nothing}": (1, "quantizer.bits: Interpolation key 'nothing' not found"),
    "quantize name=a/b": (1, "name=a/b: must be a plain name"),
    "quantize output_dir=/dev/null/runs": (1, "output_dir: cannot make /dev/null/runs/pocket_w4g128/"),
    "quantize --bits 4": (2, "jointq quantize has no option --bits; settings are KEY=VALUE, see --help"),
    "quantize --config-dir nowhere": (1, "Additional config directory"),
    "evaluate quantizer=rtn": (1, "no such group quantizer; there are name, model, reference,"),
    "evaluate reference=[a]": (1, "reference=[a]: must be text or null"),
    "calibrate calibration.num_samples=0": (1, "calibration.num_samples=0: must be at least 1"),
    "recipes show pocket": (1, "recipe=pocket: did you mean pocket_w"),
    "report nowhere": (1, "nowhere/report.json: cannot be read"),
    "compare nowhere": (1, "nowhere: no such directory"),
    "compare .": (1, ".: neither a finished run, which has a report.json, nor a sweep of runs 0, 1, ..."),
    "compare --html nowhere/page.html x": (1, "nowhere/page.html: there is no directory nowhere"),
    "quantise": (2, "no command 'quantise'; did you mean 'quantize'?"),
    "recipe=ci_smoke": (2, "'recipe=ci_smoke' is a setting and needs a command before it"),
    "frobnz": (2, "no command 'frobnz'; there are quantize, plan, rotate, evaluate,"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_gives_one_line_its_exit_code_and_leaves_nothing_behind(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, message = MISTAKES[words]
    assert main(words.split()) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [path for path in tmp_path.rglob("*") if path.name != "runs"] == []


def test_a_folder_that_was_there_before_survives_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["quantize", "output_dir=mine", "quantizer.bits=9"]) == 1
    assert main(["calibrate", "quantizer.bits=9"]) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_mistake_in_a_recipe_file_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, "mine", "quantizer:\n  bit: 3\n")
    assert main(["quantize", "--config-dir", str(tmp_path), "recipe=mine"]) == 1
    assert (
        capsys.readouterr().err == "error: recipe/mine.yaml: no such key quantizer.bit; did you mean quantizer.bits?\n"
    )


@pytest.mark.parametrize("body", ["name: mine\n", "defaults:\n  - override /model: pocket\n\nname: mine\n"])
def test_a_recipe_file_without_its_package_line_is_told_so(
    body: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(body)
    assert main(["quantize", "--config-dir", str(tmp_path), "recipe=mine"]) == 1
    rule = "a recipe must begin with the line `# @package _global_`"
    assert capsys.readouterr().err == f"error: recipe/mine.yaml: {rule}\n"


@pytest.mark.parametrize("value", ["~/a", "a=b", "a#b", "a%b@c", "modèle/日本", "a~b\\"])
def test_a_path_is_read_as_it_is_typed(value: str, jobs: list[tuple[Any, Job]]) -> None:
    assert run(f"quantize model.path={value}", jobs) == 0
    assert jobs[0][0].model.path == value


def test_the_values_of_a_sweep_are_read_as_they_are_typed(jobs: list[tuple[Any, Job]]) -> None:
    run("quantize -m model.path=~/a,b=c", jobs)
    assert [recipe.model.path for recipe, _ in jobs] == ["~/a", "b=c"]


@pytest.mark.parametrize("value", ['a"b', "a,b", "a (1)", "it's"])
def test_the_quoting_that_a_message_names_works(
    value: str, jobs: list[tuple[Any, Job]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", f"model.path={value}"]) == 1
    [word] = shlex.split(re.split("brackets: |comma ", capsys.readouterr().err)[1])
    launch("quantize", [word], lambda recipe, job: jobs.append((recipe, job)))
    assert jobs[0][0].model.path == value


def test_a_recipe_file_that_is_no_yaml_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, "mine", "quantizer: {bits\n")
    assert main(["quantize", "--config-dir", str(tmp_path), "recipe=mine"]) == 1
    output = capsys.readouterr().err
    assert output.startswith("error: not readable as yaml: ")
    assert "mine.yaml" in output
    assert output.count("\n") == 1


def test_hydra_full_error_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="no such key") as caught:
        main(["quantize", "quantizer.bit=4"])
    assert "Could not override 'quantizer.bit'" in str(caught.value.__cause__)
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def write_recipe(folder: Path, name: str, body: str) -> None:
    (folder / "recipe").mkdir()
    (folder / "recipe" / f"{name}.yaml").write_text(f"# @package _global_\nname: {name}\ndescription: d\n{body}")


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (
            "/schema@_here_: RTM",
            "quantizer/mine.yaml: /schema@_here_: no dataclass called RTM is the type of a setting; did",
        ),
        (
            "/schema@_here_: UniformQuantizer",
            "quantizer/mine.yaml: /schema@_here_: UniformQuantizer is abstract: it lacks _p",
        ),
        (
            "",
            "quantizer/mine.yaml: no such key quantizer.bits; the file of an option of quantizer begins with",
        ),
    ],
)
def test_an_own_option_of_no_usable_class_is_an_error_that_names_its_file(
    first: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quantizer").mkdir()
    defaults = f"- {first}\n  - _self_" if first else "- _self_"
    (tmp_path / "quantizer" / "mine.yaml").write_text(f"defaults:\n  {defaults}\nbits: 4\n")
    assert main(["quantize", "--config-dir", str(tmp_path), "quantizer=mine"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


# --- from a composed config to a job


def test_the_task_gets_a_typed_recipe_its_folder_and_the_overrides(jobs: list[tuple[Any, Job]], tmp_path: Path) -> None:
    assert run("quantize recipe=ci_smoke quantizer.bits=3", jobs) == 0
    [(recipe, job)] = jobs
    assert isinstance(recipe, Recipe)
    assert isinstance(recipe.quantizer, JointQ)
    assert recipe.quantizer.bits == 3
    assert recipe.store == "runs/store"
    assert job.directory.parent == tmp_path / "runs" / "ci_smoke"
    assert job.directory.is_dir()
    assert job.overrides == ["recipe=ci_smoke", "quantizer.bits=3"]


def test_overrides_may_stand_on_both_sides_of_an_option(jobs: list[tuple[Any, Job]]) -> None:
    assert run("quantize recipe=ci_smoke -m quantizer.bits=3,4", jobs) == 0
    assert [recipe.quantizer.bits for recipe, _ in jobs] == [3, 4]


def test_overrides_of_layers_are_entries_of_a_dictionary_in_their_order(
    jobs: list[tuple[Any, Job]], tmp_path: Path
) -> None:
    words = "quantize recipe=ci_smoke quantizer=rtn"
    given = "{model.layers.0.*:keep,v_proj:{bits:6,group_size:null},re\\:.*o_proj:{}}"
    run(f"{words} layers.overrides={given}", jobs)
    written = {"model.layers.0.*": "keep", "v_proj": {"bits": 6, "group_size": None}, "re:.*o_proj": {}}
    assert list(jobs[0][0].layers.overrides.items()) == list(written.items())
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "again.yaml").write_text(jobs[0][1].config)
    run(f"quantize --config-dir {tmp_path} recipe=again layers.overrides={{a_proj:keep,v_proj:{{bits:5}}}}", jobs)
    later = {**written, "v_proj": {"bits": 5, "group_size": None}, "a_proj": "keep"}
    assert list(jobs[1][0].layers.overrides.items()) == list(later.items())
    run(f"{words} -m layers.overrides={{v_proj:{{bits:6}}}},{{v_proj:keep,o_proj:{{bits:3}}}}", jobs)
    assert [recipe.layers.overrides for recipe, _ in jobs[2:]] == [
        {"v_proj": {"bits": 6}},
        {"v_proj": "keep", "o_proj": {"bits": 3}},
    ]


def test_the_config_of_a_job_is_a_recipe_that_gives_the_same_again(jobs: list[tuple[Any, Job]], tmp_path: Path) -> None:
    run("quantize recipe=ci_smoke quantizer=rtn quantizer.bits=5 evaluation.max_windows=3", jobs)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "again.yaml").write_text(jobs[0][1].config)
    run(f"quantize --config-dir {tmp_path} recipe=again", jobs)
    assert jobs[0][0] == jobs[1][0]


def test_an_own_recipe_may_extend_a_shipped_one(jobs: list[tuple[Any, Job]], tmp_path: Path) -> None:
    write_recipe(tmp_path, "mine", "defaults:\n  - ci_smoke\n  - _self_\nquantizer:\n  bits: 2\n")
    assert run(f"quantize --config-dir {tmp_path} recipe=mine", jobs) == 0
    assert jobs[0][0].quantizer.bits == 2
    assert jobs[0][0].calibration.seqlen == 128


def test_the_task_sees_the_whole_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["before"])
    seen: list[list[str]] = []
    folder = ["--config-dir", "."]
    launch("quantize", [*folder, "recipe=ci_smoke"], lambda recipe, job: seen.append(sys.argv))
    launch("quantize", ["-m", *folder, "quantizer.bits=3,4"], lambda recipe, job: seen.append(sys.argv))
    settings = ["recipe=ci_smoke", "quantizer.bits=3", "quantizer.bits=4"]
    assert seen == [["jointq", "quantize", setting, *folder] for setting in settings]
    assert sys.argv == ["before"]


def test_cfg_job_prints_the_config_and_runs_nothing(
    jobs: list[tuple[Any, Job]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("quantize --cfg job quantizer.bits=7", jobs) == 0
    assert "bits: 7" in capsys.readouterr().out
    assert jobs == []
    assert list(tmp_path.iterdir()) == []


def test_calibrate_makes_no_run_directory(jobs: list[tuple[Any, Job]], tmp_path: Path) -> None:
    assert run("calibrate recipe=llama1b_w4g128", jobs) == 0
    assert jobs[0][0].output == "llama1b_w4g128.tokens.safetensors"
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback() -> None:
    def task(recipe: Any, job: Job) -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        launch("quantize", [], task)


def test_an_error_of_the_task_is_raised_as_it_is() -> None:
    error = NumericsError("layer x")

    def task(recipe: Any, job: Job) -> None:
        raise error

    with pytest.raises(NumericsError) as caught:
        launch("quantize", [], task)
    assert caught.value is error


# --- renamed keys

OLD, NEW = "runtime.waiting_gb", "runtime.suspended_activations_gb"
ANNOUNCED = f"{OLD} is now {NEW}; the old name still works\n"


def test_an_old_key_on_the_command_line_sets_the_new_one_and_says_so_once(
    jobs: list[tuple[Any, Job]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"quantize {OLD}=1 ++{OLD}=2", jobs) == 0
    assert capsys.readouterr().err == ANNOUNCED
    [(recipe, job)] = jobs
    assert recipe.runtime.suspended_activations_gb == 2
    assert job.overrides == [f"{NEW}=1", f"++{NEW}=2"]


def test_an_old_key_in_a_recipe_sets_the_new_one_and_the_command_line_still_comes_last(
    jobs: list[tuple[Any, Job]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(tmp_path, "mine", "runtime:\n  waiting_gb: 1.5\n")
    for words in ("", f" {NEW}=3"):
        assert run(f"quantize --config-dir {tmp_path} recipe=mine{words}", jobs) == 0
        assert capsys.readouterr().err == ANNOUNCED
    assert [recipe.runtime.suspended_activations_gb for recipe, _ in jobs] == [1.5, 3]
    assert not any("waiting_gb" in job.config for _, job in jobs)


def test_an_option_of_ones_own_may_have_old_keys(
    jobs: list[tuple[Any, Job]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my" / "runtime").mkdir(parents=True)
    own = config_files.options("runtime")["default"].read_text(encoding="utf-8")
    (tmp_path / "my" / "runtime" / "old.yaml").write_text(own.replace("suspended_activations_gb: 4.0", "waiting_gb: 7"))
    assert run("quantize --config-dir my runtime=old", jobs) == 0
    assert capsys.readouterr().err == ANNOUNCED
    assert jobs[0][0].runtime.suspended_activations_gb == 7


@pytest.mark.parametrize("words", [f"{OLD}=1,2", "+sweep=mine"])
def test_a_sweep_may_run_over_an_old_key(
    words: str, jobs: list[tuple[Any, Job]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my" / "sweep").mkdir(parents=True)
    text = f"# @package _global_\nhydra:\n  sweeper:\n    params:\n      {OLD}: 1,2\n"
    (tmp_path / "my" / "sweep" / "mine.yaml").write_text(text)
    assert run(f"quantize --config-dir my -m {words}", jobs) == 0
    assert [recipe.runtime.suspended_activations_gb for recipe, _ in jobs] == [1, 2]
    assert capsys.readouterr().err == ANNOUNCED


def test_a_key_by_both_names_is_refused(jobs: list[tuple[Any, Job]], tmp_path: Path) -> None:
    write_recipe(tmp_path, "mine", "runtime:\n  waiting_gb: 1\n  suspended_activations_gb: 2\n")
    with pytest.raises(ConfigError, match=f"^{OLD}: is the old name of {NEW}, which has a value too"):
        run(f"quantize --config-dir {tmp_path} recipe=mine", jobs)


def test_nothing_is_said_of_old_keys_that_are_not_used(
    jobs: list[tuple[Any, Job]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"quantize {NEW}=2", jobs) == 0
    assert capsys.readouterr().err == ""


# --- sweeps


def failing_on(error: Exception, bits: int, done: list[int]) -> Any:
    def task(recipe: Recipe, job: Job) -> None:
        if recipe.quantizer.bits == bits:
            raise error
        done.append(recipe.quantizer.bits)

    return task


@pytest.mark.parametrize("error", [NumericsError("layer x"), ValueError("a bug")])
def test_a_failed_job_of_a_sweep_is_told_and_the_others_go_on(
    error: Exception, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done: list[int] = []
    assert launch("quantize", ["-m", "quantizer.bits=3,4"], failing_on(error, 3, done)) == 1
    assert done == [4]
    assert str(error) in capsys.readouterr().out
    [sweep] = (tmp_path / "runs" / "pocket_w4g128").iterdir()
    states = [json.loads((sweep / job / "job.json").read_text())["state"] for job in "01"]
    assert states == ["failed", "done"]


def test_the_same_sweep_again_runs_only_what_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    sweep = ["-m", "quantizer.bits=2,3,4"]
    assert launch("quantize", sweep, failing_on(NumericsError("layer x"), 3, done)) == 1
    assert launch("quantize", sweep, failing_on(NumericsError("layer x"), 9, done)) == 0
    assert done == [2, 4, 3]
    capsys.readouterr()
    assert launch("quantize", sweep, failing_on(NumericsError("layer x"), 9, done)) == 0
    assert done == [2, 4, 3]
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert all([job, f"bits={bits}"] in rows for job, bits in ("02", "13", "24"))
    assert not [row for row in rows if row[1:2] == ["of"]]  # "2 of 3 jobs done"


def test_jobs_that_differ_in_values_are_composed_once_and_are_what_each_is_alone(
    monkeypatch: pytest.MonkeyPatch, jobs: list[tuple[Any, Job]]
) -> None:
    composed: list[list[str]] = []
    load = ConfigLoaderImpl.load_sweep_config

    def counted(loader: ConfigLoaderImpl, config: Any, overrides: list[str]) -> Any:
        composed.append(overrides)
        return load(loader, config, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    words = ["recipe=pocket_w3g128", "+layers.overrides.o_proj.bits=8", "evaluation.max_windows=7"]
    swept = ["quantizer=gptq,jointq", "quantizer.bits=2,3"]
    assert launch("quantize", ["-m", *words, *swept], lambda recipe, job: jobs.append((recipe, job))) == 0
    assert composed == [["recipe=pocket_w3g128", f"quantizer={name}"] for name in ("gptq", "jointq")]
    together = list(jobs)
    assert [job.overrides[-2:] for _, job in together] == [
        [f"quantizer={name}", f"quantizer.bits={bits}"] for name in ("gptq", "jointq") for bits in (2, 3)
    ]
    for recipe, job in (together[0], together[3]):
        assert launch("quantize", job.overrides, lambda recipe, job: jobs.append((recipe, job))) == 0
        assert jobs[-1][0] == recipe
        assert jobs[-1][1].config == job.config


def test_another_sweep_has_a_directory_of_its_own(tmp_path: Path) -> None:
    for bits in ("3,4", "3,2"):
        assert launch("quantize", ["-m", f"quantizer.bits={bits}"], failing_on(ValueError(), 9, [])) == 0
    assert len(list((tmp_path / "runs" / "pocket_w4g128").iterdir())) == 2


SWEPT = {
    "quantize +sweep=lambda": "quantizer.regularization_lambda: needs -m: jointq quantize -m +sweep=lambda",
    "rotate --config-dir my +sweep=mine": "a sweep over model: needs -m: jointq rotate -m +sweep=mine",
    "calibrate +sweep=calibration_size": "needs -m: jointq calibrate -m +sweep=calibration_size",
    "evaluate --config-dir my +sweep=mine": "needs -m: jointq evaluate -m +sweep=mine --config-dir my",
    "quantize recipe=pocket_rotations quantizer=rtn": "over rotation, activations: needs -m: jointq quantize -m",
    "plan +sweep=bits name=x": "for its first job: jointq plan quantizer=rtn quantizer.bits=4 +sweep=bits name=x",
}


SLOW_TO_COMPOSE = "quantize recipe=pocket_rotations quantizer=rtn"  # each of its many jobs


@pytest.mark.parametrize(
    "words", [pytest.param(words, marks=[pytest.mark.slow] if words == SLOW_TO_COMPOSE else []) for words in SWEPT]
)
def test_one_run_of_a_sweep_is_refused_with_the_right_command(
    words: str, jobs: list[tuple[Any, Job]], tmp_path: Path
) -> None:
    (tmp_path / "my" / "sweep").mkdir(parents=True)
    text = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      model: pocket,tinyllama\n"
    (tmp_path / "my" / "sweep" / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(SWEPT[words])) as refused:
        run(words, jobs)
    assert not jobs
    assert not list(tmp_path.glob("runs/*"))
    if "calibrate" not in words:  # which needs an output for each job
        assert run(str(refused.value).partition("jointq ")[2], jobs) == 0


def test_a_job_of_a_sweep_can_be_run_alone(jobs: list[tuple[Any, Job]]) -> None:
    assert run("quantize recipe=pocket_rotations rotation=none quantizer=rtn activations=none", jobs) == 0
    assert len(jobs) == 1


def test_another_sweep_into_one_directory_is_refused_before_any_job_begins(tmp_path: Path) -> None:
    done: list[int] = []
    task = failing_on(ValueError(), 9, done)
    there = "hydra.sweep.dir=there"
    assert launch("quantize", ["-m", "quantizer.bits=3,4", there], task) == 0
    before = {file: file.read_bytes() for file in tmp_path.glob("there/*") if file.is_file()}
    for words in (["quantizer.bits=3,2"], ["quantizer.bits=3,4", "quantizer=rtn"], ["quantizer.bits=3"]):
        rule = r"hydra\.sweep\.dir=.*/there: has the sweep of `jointq quantize quantizer.bits=3,4 .* -m`"
        with pytest.raises(ConfigError, match=rule):
            launch("quantize", ["-m", *words, there], task)
    assert done == [3, 4]
    assert {file: file.read_bytes() for file in tmp_path.glob("there/*") if file.is_file()} == before


def test_a_sweep_in_a_given_directory_continues_by_another_launcher_and_with_more_jobs(tmp_path: Path) -> None:
    done: list[int] = []
    task = failing_on(ValueError(), 9, done)
    for words in (["quantizer.bits=3,4"], ["quantizer.bits=3,4", "hydra/launcher=basic"], ["quantizer.bits=3,4,2"]):
        assert launch("quantize", ["-m", *words, "hydra.sweep.dir=there"], task) == 0
    assert done == [3, 4, 2]


def test_a_job_whose_text_has_changed_runs_again(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    done: list[int] = []
    for content in ("one", "one", "another"):
        if not text.exists() or text.read_text() != content:
            text.write_text(content)
        words = ["-m", "quantizer.bits=3,4", "calibration=text", f"calibration.path={text}"]
        assert launch("quantize", words, failing_on(ValueError(), 9, done)) == 0
    assert done == [3, 4, 3, 4]


IN_PROCESSES = """
import sys
from jointq_cli.errors import NumericsError
from jointq_cli.cli.compose import launch

def task(recipe, job):
    assert job.elsewhere
    if recipe.quantizer.bits == 3:
        raise NumericsError("layer x")

if __name__ == "__main__":
    sys.exit(launch("quantize", ["-m", "quantizer.bits=3,4", "hydra/launcher=processes"], task))
"""


@pytest.mark.slow
def test_the_jobs_of_a_sweep_by_launcher_processes_end_as_in_one_process(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "sweep.py").write_text(IN_PROCESSES)
    assert subprocess.run([sys.executable, "sweep.py"], check=False).returncode == 1
    [sweep] = (tmp_path / "runs" / "pocket_w4g128").iterdir()
    records = [json.loads((sweep / job / "job.json").read_text()) for job in "01"]
    assert [record["state"] for record in records] == ["failed", "done"]
    assert records[0]["error"] == "layer x"


def test_a_value_out_of_range_is_told_before_any_job_begins(jobs: list[tuple[Any, Job]], tmp_path: Path) -> None:
    rule = "job 1 .*quantizer.bits=9.*: quantizer.bits=9: must be from 1 to 8; no job has begun"
    with pytest.raises(ConfigError, match=rule):
        run("quantize -m quantizer.bits=4,9", jobs)
    assert not jobs
    assert not list(tmp_path.glob("runs/*/sweep*/[0-9]*"))


def test_jobs_that_differ_in_what_the_sweep_is_called_by_lie_in_one_place(tmp_path: Path) -> None:
    assert launch("quantize", ["-m", "recipe=ci_smoke,pocket_w2g128"], failing_on(ValueError(), 9, [])) == 0
    assert len(list(tmp_path.glob("runs/*/sweep_*/[01]/job.json"))) == 2
    assert len(list(tmp_path.glob("runs/*/sweep_*"))) == 1


def test_a_recipe_may_say_where_its_sweeps_lie(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\nname: mine\ndescription: mine\nhydra:\n  sweep:\n    dir: there\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    words = ["-m", "--config-dir", str(tmp_path), "recipe=mine", "quantizer.bits=3,4"]
    assert launch("quantize", words, failing_on(ValueError(), 9, [])) == 0
    assert len(list(tmp_path.glob("there/[01]/job.json"))) == 2


def test_two_jobs_that_would_write_one_file_are_refused(jobs: list[tuple[Any, Job]]) -> None:
    with pytest.raises(
        ConfigError, match=r"job 1 .*output: .*safetensors: another job writes it too.*no job has begun"
    ):
        run("calibrate -m calibration.seed=0,1", jobs)
    assert not jobs
    launch("calibrate", ["-m", "calibration.seed=0,1", "output='a_${hydra:job.num}'"], lambda *job: jobs.append(job))
    assert [recipe.output for recipe, _ in jobs] == ["a_0", "a_1"]


def test_a_changed_text_of_a_pattern_runs_its_jobs_again(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    done: list[int] = []
    for content in ("one", "another"):
        (tmp_path / "texts" / "a.txt").write_text(content)
        words = ["-m", "quantizer.bits=3,4", "calibration=text", "calibration.path='texts/*.txt'"]
        assert launch("quantize", words, failing_on(ValueError(), 9, done)) == 0
    assert done == [3, 4, 3, 4]


def test_the_recipe_of_a_job_does_without_options_of_ones_own(tmp_path: Path, jobs: list[tuple[Any, Job]]) -> None:
    (tmp_path / "my" / "quantizer").mkdir(parents=True)
    own = config_files.options("quantizer")["gptq"].read_text().replace("damping: 0.01", "damping: 0.5")
    (tmp_path / "my" / "quantizer" / "mine.yaml").write_text(own)
    assert run("quantize --config-dir my quantizer=mine", jobs) == 0
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "again.yaml").write_text(jobs[0][1].config)
    assert run(f"quantize --config-dir {tmp_path} recipe=again", jobs) == 0
    assert jobs[0][0] == jobs[1][0]
    assert jobs[1][0].quantizer.damping == 0.5


def test_a_directory_for_each_job_of_ones_own_is_refused(jobs: list[tuple[Any, Job]]) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.subdir: cannot be given"):
        run("quantize -m quantizer.bits=3,4 hydra.sweep.subdir=x", jobs)


def test_an_interrupted_sweep_stops_with_its_exit_code() -> None:
    done: list[int] = []
    with pytest.raises(Interrupted) as caught:
        launch("quantize", ["-m", "quantizer.bits=3,4"], failing_on(Interrupted("stopped"), 3, done))
    assert caught.value.exit_code == 75
    assert done == []


# --- completion

QUESTIONS = {
    "jointq ": set(COMMANDS),
    "jointq qu": {"quantize"},
    "jointq quantize rec": {"recipe="},
    "jointq quantize recipe=pocket_w4": {"recipe=pocket_w4a4", "recipe=pocket_w4g128"},
    "jointq quantize recipe=qwen": {
        *("recipe=qwen3_0.6b_w4g128", "recipe=qwen3_0.6b_q4_0", "recipe=qwen3_0.6b_q4_k_m"),
    },
    "jointq quantize quantizer=gptq quantizer.da": {"quantizer.damping="},
    "jointq quantize quantizer.regularization_": {
        f"quantizer.regularization_{key}=" for key in ("lambda", "mode", "gamma", "floor", "reference")
    },
    "jointq quantize quantizer=rtn quantizer.": {
        f"quantizer.{key}="
        for key in (
            *("bits", "group_size", "symmetric", "zero_point", "incoherence", "incoherence_seed"),
            "incoherence_block",
            *("grid", "mse", "importance"),
        )
    },
    "jointq evaluate evaluation=": {f"evaluation={name}" for name in config_files.options("evaluation")},
    "jointq recipes ": {"show"},
    "jointq recipes show ": set(config_files.options("recipe")),
    "jointq report ": set(),
    "jointq compare ": set(),
    "jointq store ": {"ls", "size", "prune"},
    "jointq store ls ": set(),
}


@pytest.mark.parametrize("line", QUESTIONS)
def test_a_shell_is_told_what_may_come_next(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert completion.main(["-sc", "query=bash"]) == 0
    assert set(capsys.readouterr().out.split()) == QUESTIONS[line]


def test_keys_and_groups_are_offered_but_no_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "jointq quantize ")
    answer = completion._answers(["-sc", "query=bash"])
    assert {"recipe=", "quantizer=", "quantizer.", "output_dir="} <= set(answer)
    assert not [word for word in answer if word.startswith("schema")]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_the_installed_completion_is_for_jointq(shell: str) -> None:
    assert "jointq" in "\n".join(complete("quantize", ["-sc", f"install={shell}"]))


def test_bash_completes_a_recipe() -> None:
    """The real shell with the real script, its question answered by this interpreter."""
    script = complete("quantize", ["-sc", "install=bash"])
    driver = f"""
jointq() {{ {sys.executable} -c "from jointq_cli.cli.main import main; main()" "$@"; }}
command() {{ echo /bin/sh; }}
compgen() {{ builtin compgen "$@"; }}
{chr(10).join(line for line in script if "complete -" not in line)}
COMP_LINE="jointq quantize recipe=pocket_w3"; COMP_POINT=${{#COMP_LINE}}; COMP_CWORD=2
hydra_bash_completion
echo "${{COMPREPLY[@]}}"
"""
    answer = subprocess.run(["bash", "-c", driver], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["recipe=pocket_w3g128"], answer.stderr


# --- the keys of a recipe


def test_keys_cover_every_quantizer() -> None:
    known = set(keys(RECIPES["quantize"]))
    assert {"quantizer.bits", "quantizer.damping", "model.path", "calibration.dataset"} <= known


def test_subclasses_of_a_field_are_found_and_the_abstract_base_is_not() -> None:
    assert {GPTQ, RTN, JointQ} <= set(concrete(Quantizer))
    assert Quantizer not in concrete(Quantizer)


@pytest.mark.parametrize("words", [["quantize"], ["quantize", "-m", "quantizer.bits=3,4"], ["evaluate"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_time_is_one_line_that_says_how_to_go_on(
    number: signal.Signals, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(recipe: Any, job: Job) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(f"jointq_cli.cli.commands.{words[0]}.run", stopped)
    assert main(words) == 75
    assert capsys.readouterr().err == "error: interrupted; what is finished is kept, and the same command continues\n"


def test_a_signal_while_libraries_load_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: os.kill(os.getpid(), signal.SIGTERM))
    assert [main([command]) for command in ("quantize", "compare")] == [75, 130]
    assert capsys.readouterr().err.splitlines() == [f"error: {Interrupted()}", "interrupted"]


# --- two processes at once

ONE_SECOND = """
import datetime, sys
import hydra.core.utils as utils

class Noon(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1, 12, 0, 0)

utils.datetime = Noon
from jointq_cli.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def at_once(*commands: list[str]) -> list[tuple[int, str]]:
    """Exit codes and standard errors of processes that start together, in the same second by their clocks."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", ONE_SECOND, *words], env=env, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
        for words in commands
    ]  # fmt: skip
    return [(process.returncode, err) for process in started for _, err in [process.communicate(timeout=300)]]


SHORT = ["evaluate", "evaluation.seqlen=32", "evaluation.max_windows=4"]


@pytest.mark.slow
def test_two_runs_of_one_second_have_a_directory_each(tmp_path: Path) -> None:
    runs = [[*SHORT, f"evaluation.max_windows={count}"] for count in (3, 4)]
    assert at_once(*runs) == [(0, "")] * 2
    for directory in tmp_path.glob("runs/evaluate/*"):
        windows = json.loads((directory / "evaluation.json").read_text())["protocol"]["windows"]
        assert f"max_windows: {windows}\n" in (directory / "recipe.yaml").read_text()
    assert {path.name for path in tmp_path.glob("runs/evaluate/*")} == {
        "2026-01-01_12-00-00",
        "2026-01-01_12-00-00_2",
    }


def test_two_runs_into_one_given_directory_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claimed(tmp_path / "run", new=False):  # locks are those of open files, not of processes
        assert main([*SHORT, "hydra.run.dir=run"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"hydra.run.dir={tmp_path}/run: another run is writing there" in err
    assert not list((tmp_path / "run").iterdir())
