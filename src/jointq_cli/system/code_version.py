"""Which source files decide a result: a module of this package and, transitively, every module that it imports.

Read from the import statements with `ast`; nothing is imported. A package's own `__init__` counts where a name is taken
from it. What a module loads by a computed name is not seen: pass such modules as well, as `artifact_key` does with the
classes of the settings.
"""

import ast
import functools
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("torch", "transformers", "numba")  # whose versions may change a result's bits
# Modules that start, show, plan and store computations. An edit there changes no artifact.
NEUTRAL = (
    "__init__", "cli", "errors", "pipeline", "recipe", "report", "setting_rules", "stages.base", "stages.plan",
    "stages.report", "system.artifact_key", "system.code_version", "system.machine", "system.store",
)  # fmt: skip


@dataclass(frozen=True)
class _Source:
    digest: bytes  # sha256 of the file's path and bytes
    imports: frozenset[str]  # modules of this package, without its name in front


class SourceTree:
    """The modules below a package directory. Each file is read and parsed at most once, when it is first needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._sources: dict[str, _Source] = {}
        self._versions: dict[frozenset[str], str] = {}

    def version(self, modules: Collection[str]) -> str:
        """sha256 (64 hex digits) over the sources of `modules`, of all that they import, and over the versions of
        LIBRARIES.

        modules: full names, such as "jointq_cli.stages.quantize"; those of other packages are left out.
        """
        own = frozenset(name for name in modules if name.partition(".")[0] == self._root.name)
        if own not in self._versions:
            self._versions[own] = _digest([self._source(name).digest for name in self.imported_by(own)])
        return self._versions[own]

    def imported_by(self, modules: Collection[str]) -> list[str]:
        """The modules themselves and all that they import, without NEUTRAL ones, in alphabetical order."""
        pending = {name.removeprefix(f"{self._root.name}.") for name in modules}
        found: set[str] = set()
        while pending:
            name = pending.pop()
            found.add(name)
            pending |= {other for other in self._source(name).imports if not _is_neutral(other)} - found
        return sorted(found)

    def _source(self, module: str) -> _Source:
        if module not in self._sources:
            file = self._file(module)
            assert file is not None, module
            content = file.read_bytes()
            digest = hashlib.sha256(f"{file.relative_to(self._root)}\0".encode() + content).digest()
            self._sources[module] = _Source(digest, frozenset(self._imports(ast.parse(content))))
        return self._sources[module]

    def _imports(self, tree: ast.Module) -> Iterator[str]:
        for node in _statements(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from (self._module(name) for name in names if name.partition(".")[0] == self._root.name)

    def _module(self, name: str) -> str:
        """The module that `import NAME`, or `from PARENT import NAME`, reads."""
        inner = name.partition(".")[2]
        while self._file(inner) is None:
            inner = inner.rpartition(".")[0]
        return inner or "__init__"

    def _file(self, module: str) -> Path | None:
        base = self._root / Path(*module.split("."))
        return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def code_version(modules: Collection[str]) -> str:
    """`SourceTree.version` of this package as it is installed."""
    return _installed().version(modules)


@functools.cache
def package_version() -> str:
    """sha256 over all sources of this package and the versions of LIBRARIES."""
    files = sorted(PACKAGE.rglob("*.py"))
    return _digest([str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes() for file in files])


@functools.cache
def _installed() -> SourceTree:
    return SourceTree(PACKAGE)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements, also those inside functions, which may import a module when they are called. Faster than
    `ast.walk`, which visits expressions too."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, field, ()):
            yield child
            yield from _statements(child)


def _is_neutral(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in NEUTRAL)


def _digest(parts: list[bytes]) -> str:
    digest = hashlib.sha256(b"".join(parts))
    for library in LIBRARIES:
        digest.update(f"{library}={_version(library)}".encode())
    return digest.hexdigest()


def _version(library: str) -> str:
    """Of an installed library. A GPU's kernels need no numba, which such a machine may lack."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
