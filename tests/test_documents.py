"""README and docs/: every command in them composes or parses, every link leads somewhere, the site builds."""

import re
import shlex
import string
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, reduce
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from jointq_cli.cli import config_files
from jointq_cli.cli.compose import JobRunner
from jointq_cli.cli.config_errors import ConfigErrorFormatter
from jointq_cli.cli.hydra_main import overrides_and_options, readable, with_entries
from jointq_cli.cli.main import COMPOSED, main
from jointq_cli.cli.schemas import mutable_schema
from jointq_cli.recipe import RECIPES, schemas, setting_roles
from jointq_cli.system.distributed import SINGLE_PROCESS

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCHEMAS = {schema.__name__: schema for schema in schemas()}
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")

pytestmark = pytest.mark.skipif(not DOCS, reason="not in a checkout")


# --- commands


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and words after `jointq` of each command in the `sh` blocks, and after `$ ` in the `console` blocks."""
    text = page.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        first = text.count("\n", 0, block.start(2)) + 1
        variables: dict[str, str] = {}
        for number, line in enumerate(block[2].replace("\\\n", "  ").splitlines(), first):
            if block[1] == "console":
                line = line.removeprefix("$ ") if line.startswith("$ ") else ""
            elif block[1] != "sh":
                continue
            if assigned := re.fullmatch(r"([A-Z]+)=(\S+)", line):
                variables[assigned[1]] = assigned[2]
            for part in string.Template(line).safe_substitute(variables).split("&&"):
                words = shlex.split(part, comments=True)
                start = next((i for i, word in enumerate(words) if word in ("jointq", "jointq_cli")), None)
                if start == 0 or (words and words[0] == "torchrun" and start is not None):
                    yield number, words[start + 1 :]


FOUND = [pytest.param(words, id=f"{page.name}:{line}:{words[0]}") for page in PAGES for line, words in commands(page)]
TO_COMPOSE = [found for found in FOUND if found.values[0][0] in COMPOSED]
TO_PARSE = [found for found in FOUND if found.values[0][0] not in COMPOSED]


def test_commands_are_found_on_most_pages() -> None:
    assert len(TO_COMPOSE) > 50
    assert len(TO_PARSE) > 15


def test_a_command_stands_in_a_block_that_is_tested() -> None:
    indented = re.compile(r"^ {4}\$? ?(jointq \w+.*)", re.MULTILINE)
    unmarked = re.compile(r"^(?:\$ )?jointq \w+ .*", re.MULTILINE)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not indented.findall(text), page
        for language, body in FENCE.findall(text):
            assert language in ("sh", "console") or not unmarked.findall(body), page


@pytest.fixture(scope="module", autouse=True)
def _schemas() -> None:
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(group="schema", name=name, node=mutable_schema(schema))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for every --config-dir: one with a recipe of its own."""
    place = tmp_path_factory.mktemp("folder")
    (place / "recipe").mkdir()
    bundled = config_files.options("recipe")["pocket_w3g128"]
    (place / "recipe" / "best.yaml").write_text(bundled.read_text(encoding="utf-8"), encoding="utf-8")
    return place


@cache
def composed(command: str, choices: tuple[str, ...]) -> tuple[DictConfig, Any]:
    """The config, and Hydra's own, of options of groups alone: many commands differ in values only, and composing is
    what takes time."""
    with initialize_config_dir(str(config_files.config_dir()), version_base="1.3"):
        config = compose(command, list(choices), return_hydra_config=True)
    hydra = OmegaConf.to_container(config.hydra, resolve=False)
    with open_dict(config):
        del config["hydra"]
    return config, hydra


def jobs(words: list[str]) -> Iterator[list[str]]:
    """Jobs of a sweep in which each swept value occurs; of other commands, the words themselves."""
    parsed = OverridesParser.create().parse_overrides(words)
    values = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [word]
        for each, word in zip(parsed, words, strict=True)
    ]
    for row in zip_longest(*values):
        yield [value or column[-1] for value, column in zip(row, values, strict=True)]


@pytest.mark.parametrize("words", TO_COMPOSE)
def test_a_command_composes_to_a_recipe(words: list[str], folder: Path) -> None:
    command, *arguments = words
    dictionaries = setting_roles(RECIPES[command]).dictionaries
    typed, options = overrides_and_options(command, arguments)
    overrides = [with_entries(readable(word), dictionaries) for word in typed]
    place = [f"hydra.searchpath=[file://{folder}]"] if "--config-dir" in options else []
    groups = {*config_files.groups(), "sweep"}
    for job in jobs(overrides) if {"-m", "--multirun"} & {*options} else [overrides]:
        chosen = [word for word in job if (key := word.lstrip("+~").partition("=")[0]) in groups or "/" in key]
        config, hydra = composed(command, (*place, *chosen))
        own = [word.partition("=")[0] for word in job if word.startswith("hydra.")]
        assert all(reduce(lambda part, name: part[name], key.split(".")[1:], hydra) for key in own)
        values = [word for word in job if word not in chosen and not word.startswith("hydra.")]
        assert isinstance(typed_recipe(command, config.copy(), values), RECIPES[command])


def typed_recipe(command: str, config: DictConfig, values: list[str]) -> Any:
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
    formatter = ConfigErrorFormatter([], SCHEMAS, values)
    runner = JobRunner(command, [], lambda recipe, job: None, SCHEMAS, formatter, SINGLE_PROCESS)
    return runner._typed(OmegaConf.to_object(config), "")


@pytest.mark.parametrize("words", TO_PARSE)
def test_another_command_parses(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails at the directory that it names, which is not there; words that it does not know come before that."""
    monkeypatch.chdir(tmp_path)
    code = main(words)
    place = "--store=runs/store" if words[0] == "store" else words[1] if len(words) > 1 else ""
    assert code == 0 or capsys.readouterr().err.startswith(f"error: {place}")
    if words[0] == "reproduce":
        keys = {word.partition("=")[0] for word in words if re.match(r"[\w.]+=", word)}
        assert keys <= set(setting_roles().replayable)


# --- links


def anchors(page: Path) -> set[str]:
    """As mkdocs makes them of headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = (re.sub(r"[^\w\s-]", "", line).strip().lower() for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[-\s]+", "-", heading) for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith(("http://", "https://")):
            file = page.parent / target if target else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_pages_named_in_the_source_exist() -> None:
    texts = [
        ROOT / "CHANGELOG.md",
        *PAGES,
        *(
            path
            for folder in ("src", "configs", "scripts", "tests", ".github")
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".yaml", ".yml", ".md")
        ),
    ]
    named = {
        name for path in texts for name in re.findall(r"(?<!main/)\bdocs/(\w+\.md)", path.read_text(encoding="utf-8"))
    }
    assert named <= {page.name for page in DOCS}


def test_every_page_is_in_the_index_and_the_navigation() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    listed = re.findall(r"^ +- (\w+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == [page.name for page in DOCS]
    assert {target for target, _ in LINK.findall(index)} == {page.name for page in DOCS} - {"index.md"}


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"https?:", text), page


def test_actions_of_workflows_are_pinned_by_commit() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    used = [action for text in texts for action in re.findall(r"uses: (\S+)", text)]
    assert used
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used)
