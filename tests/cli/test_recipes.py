"""Every shipped yaml: it composes, has all its keys, says what it is, and its numbers are as promised."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jointq_cli.cli import config_files
from jointq_cli.cli.commands.recipes import listing
from jointq_cli.cli.compose import Job, launch
from jointq_cli.cli.main import main
from jointq_cli.errors import ConfigError
from jointq_cli.quantization.quantizers import GPTQ, JointQ, Quantizer
from jointq_cli.quantization.quantizers.jointq import GptqStart
from jointq_cli.quantization.quantizers.uniform import UniformQuantizer
from jointq_cli.recipe import RECIPES, Recipe, concrete, schemas

NAMES = list(config_files.options("recipe"))
WITHOUT_SCHEMA = ("recipe", "sweep", "quality")  # their files set keys of other groups
GROUPS = {group: names for group, names in config_files.groups().items() if group not in WITHOUT_SCHEMA}
OPTIONS = [(group, option) for group, names in GROUPS.items() for option in names]
PROMISED = {
    "pocket_w4g128",
    "pocket_w2g128",
    "pocket_w3g128",
    "smollm2_135m_w3g64",
    "smollm2_135m_w4g64",
    "llama1b_w4g128",
    "tinyllama_w4g128",
    "llama3_8b_w4g128",
    "qwen3_0.6b_w4g128",
    "ci_smoke",
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@functools.cache
def compose(*overrides: str) -> Recipe:
    found: list[Any] = []

    def task(recipe: Recipe, job: Job) -> None:
        found.append(recipe)

    assert launch("quantize", list(overrides), task) == 0
    return found[0]


def text_of(name: str) -> str:
    return config_files.options("recipe")[name].read_text(encoding="utf-8")


def compose_recipe(name: str, *overrides: str) -> Recipe:
    """Of a recipe that is a sweep, one job."""
    one_job = ["rotation=none", "quantizer=rtn", "activations=none"] if "params:" in text_of(name) else []
    return compose(f"recipe={name}", *one_job, *overrides)


def test_the_promised_recipes_are_there() -> None:
    assert set(NAMES) >= PROMISED


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_composes_and_is_called_as_its_file(name: str) -> None:
    recipe = compose_recipe(name)
    assert isinstance(recipe, Recipe)
    assert recipe.name == name


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_recipe_tells_bits_and_group(name: str) -> None:
    promised = re.search(r"_w(\d)g(\d+)$", name)
    quantizer = compose_recipe(name).quantizer
    assert promised is None or (quantizer.bits, quantizer.group_size) == tuple(map(int, promised.groups()))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_the_head_of_a_recipe_is_its_own(name: str) -> None:
    lines = text_of(name).splitlines()
    assert lines[0] == "# @package _global_"
    words = lines[1].removeprefix("# jointq quantize ").split()
    few = ["rotation=none", "quantizer=rtn"] if "-m" in words else []  # of a sweep's jobs, which all compose alike
    assert compose(*words, *few).name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_for_and_what_it_needs(name: str) -> None:
    path = config_files.options("recipe")[name]
    description = yaml.safe_load(text_of(name))["description"]
    assert config_files.summary(path) == description
    assert f"{name}\n    {description}\n    needs: {config_files.needs(path)}\n" in listing()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_without_the_hub_in_its_needs_uses_none(name: str) -> None:
    recipe = compose_recipe(name)
    uses = {recipe.calibration.dataset, recipe.evaluation.dataset} & {"wikitext2", "c4"}
    on_hub = re.fullmatch(r"[\w-]+/[\w.-]+", recipe.model.path) and not recipe.model.path.startswith("models/")
    assert bool(uses or on_hub) == config_files.needs(config_files.options("recipe")[name]).startswith("the hub")


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", sorted(set(GROUPS["quantizer"]) - {"jointq", "quip"}))  # quip: not on all grids
def test_every_recipe_takes_the_other_quantizers_too(quantizer: str) -> None:
    """Those without a width, or with one of their own, only where the recipe leaves the quantizer's settings open."""
    refused = {name: message for name in NAMES if (message := refusal(name, f"quantizer={quantizer}"))}
    assert not refused or quantizer in {"arb", "binary", "cq", "dbf", "onebit"}
    assert "pocket_w4g128" not in refused
    for message in refused.values():
        assert re.search(r"no such key quantizer\.\w+ with|^allocation.candidates\[0\].\w+: (Binary|DBF) has", message)


def refusal(name: str, *words: str) -> str:
    """Why a recipe cannot be composed, "" if it can."""
    try:
        compose_recipe(name, *words)
    except ConfigError as error:
        return str(error)
    return ""


def test_the_default_recipe_is_the_bundled_model_with_jointq() -> None:
    recipe = compose()
    assert recipe == compose("recipe=pocket_w4g128")
    assert recipe.model.path == "pocket"
    assert (recipe.calibration.dataset, recipe.evaluation.dataset) == ("pydoc", "pydoc")
    assert isinstance(recipe.quantizer, JointQ)
    assert (recipe.quantizer.bits, recipe.quantizer.group_size, recipe.quantizer.symmetric) == (4, 128, False)


def test_the_default_recipe_asks_for_no_bits_so_that_any_quantizer_can_be_chosen() -> None:
    assert "quantizer" not in yaml.safe_load(text_of("pocket_w4g128"))


def test_jointq_starts_from_the_schur_metric_alone_and_penalises_by_the_diagonal() -> None:
    quantizer = compose().quantizer
    assert isinstance(quantizer, JointQ)
    starts = ("enable_schur", "enable_clip_optimize", "enable_clip_optimize_ep", "enable_gptq")
    assert [name for name in starts if getattr(quantizer, name)] == ["enable_schur"]
    assert (quantizer.lambda_mode, quantizer.regularization_mode) == ("fixed_lambda", "diagonal")
    assert (quantizer.regularization_reference, quantizer.regularization_gamma) == ("mean_diagonal", 1.0)


def test_gptq_ships_with_its_strong_settings() -> None:
    quantizer = compose("quantizer=gptq").quantizer
    assert isinstance(quantizer, GPTQ)
    assert (quantizer.mse, quantizer.act_order, quantizer.static_groups) == (True, True, False)


@pytest.mark.parametrize(
    ("base", "other", "bits"),
    [
        ("pocket_w4g128", "pocket_w3g128", 3),
        ("pocket_w4g128", "pocket_w2g128", 2),
        ("smollm2_135m_w4g64", "smollm2_135m_w3g64", 3),
    ],
)
def test_recipes_of_one_family_differ_in_bits_alone(base: str, other: str, bits: int) -> None:
    four, fewer = (yaml.safe_load(show(name)) for name in (base, other))
    assert fewer["quantizer"].pop("bits") == bits
    assert four["quantizer"].pop("bits") == 4
    for values in (four, fewer):
        del values["name"], values["description"]
    assert four == fewer


def show(name: str) -> str:
    found: list[str] = []
    launch("quantize", [f"recipe={name}"], lambda recipe, job: found.append(job.config))
    return found[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("llama", "tiny", "qwen"))])
def test_hub_recipes_evaluate_by_the_gptq_protocol(name: str) -> None:
    recipe = compose_recipe(name)
    assert (recipe.evaluation.dataset, recipe.evaluation.split) == ("wikitext2", "test")
    assert (recipe.evaluation.seqlen, recipe.evaluation.stride, recipe.evaluation.max_windows) == (
        2048,
        None,
        None,
    )
    assert (recipe.calibration.num_samples, recipe.calibration.seqlen) == (128, 2048)


def test_a_quality_chooses_options_of_other_groups_and_the_command_line_has_the_last_word() -> None:
    assert compose_recipe("pocket_w3g128", "quality=fast").calibration.matmul_precision == "medium"
    best = compose_recipe("pocket_w3g128", "quality=best", "curvature=none")
    assert best.curvature.describe() == ""
    assert best.refinement.describe()
    assert best.calibration.add_generated
    assert best.quantizer == compose_recipe("pocket_w3g128", "quantizer.incoherence=input").quantizer


@pytest.mark.parametrize(
    ("overrides", "incoherence"),
    [
        ([], "input"),
        (["quantizer.bits=2", "layers.overrides={v_proj:{bits:4}}"], "input"),
        (["allocation=budget", "allocation.bits_per_weight=3"], "input"),
        (["export=mlx"], "none"),
        (["export=mlx", "quantizer.incoherence=input"], "input"),  # and refused later
        (["export=[]"], "input"),
        (["rotation=hadamard"], "none"),
        (["layers.mix=q4_k_m"], "none"),
        (["quantizer.grid=q4_k"], "none"),
        (["layers.overrides={v_proj:{grid:q4_k}}"], "none"),
        (["quantizer.lambda_mode=heldout"], "none"),
        (["quantizer=gptq"], "none"),
        (["quantizer=gptq", "quantizer.incoherence=auto"], "input"),
    ],
)
def test_the_basis_is_turned_unless_something_else_needs_it_as_it_is(overrides: list[str], incoherence: str) -> None:
    quantizer = compose_recipe("pocket_w4g128", *overrides).quantizer
    assert isinstance(quantizer, UniformQuantizer)
    assert quantizer.incoherence == incoherence


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export=mlx", "quantizer.incoherence_block=32"], "quantizer.incoherence_block=32: incoherence=auto turns"),
        (["layers.overrides={v_proj:{incoherence:auto}}"], "layers.overrides.v_proj.incoherence=auto: is decided"),
        (
            [
                "allocation=budget",
                "allocation.bits_per_weight=3",
                "allocation.candidates=[{bits:2},{incoherence:auto}]",
            ],
            "allocation.candidates[1].incoherence=auto: is decided",
        ),
    ],
)
def test_settings_of_a_basis_that_nothing_would_have_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_recipe("pocket_w4g128", *overrides)
    assert message in str(refused.value)


def test_seeds_are_those_of_all_layers() -> None:
    overrides = (
        "layers.overrides={v_proj:{incoherence_seed:5},o_proj:{bits:8},gate_proj:keep,up_proj:{incoherence:none}}"
    )
    recipe = compose_recipe("pocket_w4g128", overrides, "quantizer.incoherence_seed=3")
    found = {key: seed for key, seed in recipe.seeds.items() if "incoherence" in key}
    assert found == {"quantizer.incoherence_seed": 3, "layers.overrides.v_proj.incoherence_seed": 5}
    candidates = (
        "allocation=budget",
        "allocation.bits_per_weight=3",
        "allocation.candidates=[{bits:2},{bits:3,incoherence_seed:4}]",
    )
    assert compose_recipe("pocket_w4g128", *candidates).seeds["allocation.candidates[1].incoherence_seed"] == 4


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_an_option_has_every_key_of_its_schema_and_a_summary(group: str, option: str) -> None:
    path = GROUPS[group][option]
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    reference = content.pop("defaults")[0]["/schema@_here_"]
    [schema] = [schema for schema in schemas() if schema.__name__ == reference]
    assert list(content) == list(schema.__dataclass_fields__)
    assert config_files.summary(path)


SCHEMAS = {schema.__name__: schema for schema in schemas() if schema not in (*RECIPES.values(), GptqStart)}


def default_option(schema: str) -> Path:
    """Of the options of a type the one that a command takes by default, else that of its name, else the first."""
    found = [
        (group, option)
        for group, option in OPTIONS
        if f"/schema@_here_: {schema}\n" in GROUPS[group][option].read_text(encoding="utf-8")
    ]
    taken = {
        entry
        for command in RECIPES
        for entries in yaml.safe_load((config_files.config_dir() / f"{command}.yaml").read_text())["defaults"]
        if isinstance(entries, dict)
        for entry in entries.items()
    }
    group, option = next((entry for entry in found if entry in taken or entry[1] == schema.lower()), found[0])
    return GROUPS[group][option]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_dataclass_has_the_defaults_of_its_yaml(schema: str) -> None:
    content = yaml.safe_load(default_option(schema).read_text(encoding="utf-8"))
    del content["defaults"]
    assert dataclasses.asdict(SCHEMAS[schema]()) == content


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] != "hydra"])
def test_every_key_of_an_option_has_a_comment(group: str, option: str) -> None:
    lines = GROUPS[group][option].read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r"\s*\w+:(?! *$)|gptq:", line) and " # " not in line] == []


@pytest.mark.parametrize("row", range(max(len(names) for names in GROUPS.values())))
def test_every_option_composes(row: int) -> None:
    """Row n takes the n-th option of every group at once, short groups from their start again."""
    chosen = {group: list(names)[row % len(names)] for group, names in GROUPS.items()}
    if "zero_point" not in yaml.safe_load(GROUPS["quantizer"][chosen["quantizer"]].read_text(encoding="utf-8")):
        chosen["allocation"] = "none"  # the candidates are settings of uniform quantizers
    files = {
        "model": "model.path=DIR",
        "calibration": "calibration.path=a.txt",
        "evaluation": "evaluation.path=a.txt",
        "allocation": "allocation.bits_per_weight=3",
    }
    missing = [files[group] for group, option in chosen.items() if option in ("checkpoint", "text", "budget")]
    compose(*(f"{group}={option}" for group, option in chosen.items()), *missing)


@pytest.mark.parametrize("schema", [q for q in concrete(Quantizer) if q.__module__.startswith("jointq_cli.")])
def test_every_quantizer_has_a_yaml(schema: type[Quantizer]) -> None:
    assert any(f"/schema@_here_: {schema.__name__}\n" in path.read_text() for path in GROUPS["quantizer"].values())


@pytest.mark.parametrize("command", RECIPES)
def test_every_command_composes_as_it_is(command: str) -> None:
    found: list[Any] = []
    assert launch(command, [], lambda recipe, job: found.append(recipe)) == 0
    assert type(found[0]) is RECIPES[command]


def test_recipes_lists_all_and_show_prints_one_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{listed}" for name in NAMES)
    assert main(["recipes", "show", "qwen3_0.6b_w4g128", "quantizer.bits=3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["path"] == "Qwen/Qwen3-0.6B-Base"
    assert shown["quantizer"]["bits"] == 3


@pytest.mark.parametrize(
    "sweep",
    [
        name if name == "lambda" else pytest.param(name, marks=pytest.mark.slow)
        for name in config_files.options("sweep")
    ],
)
def test_every_shipped_sweep_composes_into_several_jobs(
    sweep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    assert launch("quantize", ["-m", f"+sweep={sweep}"], lambda recipe, job: seen.append(recipe)) == 0
    assert len(seen) == len({repr(recipe) for recipe in seen}) >= 3
    assert config_files.summary(config_files.options("sweep")[sweep])
