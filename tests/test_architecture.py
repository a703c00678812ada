"""The rooms of docs/architecture.md: who may import whom, which library lives where, and how large a file may be."""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src" / "jointq_cli"
LONGEST = 450  # lines of a file

# A room imports rooms of later rows only; rooms of one row do not know each other.
ROWS = [
    {"__main__"},
    {"cli"},
    {"pipeline"},
    {"stages"},
    {"recipe"},
    {"transforms", "tracking"},
    {"quantization", "evaluation", "report"},
    {"formats"},
    {"models", "data"},
    {"system"},
    {"setting_rules"},
    {"records", "kernels", "errors", "__init__"},
]
# (part of the package, what it may not import although the rows would let it)
WALLS = [
    ("quantization.quantizers", "models"),
    ("quantization.quantizers", "data"),
    ("kernels", "records"),
    ("records", "errors"),
]
ONLY_IN = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "datasets": {"data"},
    "lm_eval": {"evaluation"},
    "rich": {"report"},
    "jinja2": {"report"},
    "matplotlib": {"report"},
    "mlflow": {"tracking"},
    "wandb": {"tracking"},
}


def files() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCES.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    """Dotted names: modules, and what is taken from them, which may be a module too."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def module(path: Path) -> str:
    """Such as "quantization.loop"."""
    return ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    return name.split(".")[0]


ARROWS = {
    (module(path), name.removeprefix("jointq_cli."))
    for path, tree in files()
    for name in imported(ast.walk(tree))
    if name.startswith("jointq_cli.")
}
LIBRARIES = {
    (module(path), name.split(".")[0])
    for path, tree in files()
    for name in imported(ast.walk(tree))
    if not name.startswith("jointq_cli")
}


def test_every_room_has_its_row() -> None:
    assert {room(module(path)) for path, _ in files()} == set().union(*ROWS)


def test_imports_point_one_way() -> None:
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    wrong = {
        f"{start} imports {end}"
        for start, end in ARROWS
        if room(end) in row and room(start) != room(end) and row[room(end)] <= row[room(start)]
    }
    assert wrong == set()


@pytest.mark.parametrize(("part", "unknown"), WALLS)
def test_no_import_goes_through_a_wall(part: str, unknown: str) -> None:
    assert not [arrow for arrow in ARROWS if arrow[0].startswith(part) and room(arrow[1]) == unknown]


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """As far as imports at the top go; those inside functions are there to come later."""
    modules = {module(path) for path, _ in files()}
    graph: dict[str, set[str]] = {}
    for path, tree in files():
        names = {name.removeprefix("jointq_cli.") for name in imported(tree.body) if name.startswith("jointq_cli.")}
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module(path)] = found & modules - {module(path)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_known_in_its_rooms_only(library: str) -> None:
    assert {room(start) for start, name in LIBRARIES if name == library} <= ONLY_IN[library]


@pytest.mark.parametrize(("library", "home"), [("numba", "kernels.compiled"), ("triton", "kernels.cuda_flips")])
def test_a_compiler_is_known_to_one_module(library: str, home: str) -> None:
    assert {start for start, name in LIBRARIES if name == library} == {home}


def test_no_file_is_hard_to_hold_in_the_head() -> None:
    lengths = {module(path): path.read_text(encoding="utf-8").count("\n") for path, _ in files()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_a_class_name_means_one_thing() -> None:
    names = Counter(node.name for _, tree in files() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []
