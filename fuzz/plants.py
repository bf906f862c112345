"""What can be planted in every rank: a function of a module, `MODULE:FUNCTION`, or of a file, `FILE.py:FUNCTION`.

Sources are read here, and run inside the ranks only, since they import megatron-core. Knows files and names; the
standard library alone.
"""

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORM = (
    "must be MODULE:FUNCTION or FILE.py:FUNCTION, with a module that can be imported, or a file, and a function in it"
)
PACKAGE = "toy_models.planted"
# Of the package: mends of known bugs, how a bug is planted, and bugs of helpers, which cases hardly meet.
NO_BUGS = ("__init__", "mends", "mends_of_layers", "mends_of_recomputation", "rewrite", "functions")


@dataclass(frozen=True)
class Plant:
    """A bug: `id` names it, `plant` is what the ranks are told, `said` its docstring."""

    id: str
    plant: str
    said: str


def resolved(plant: str) -> str:
    """The plant as ranks can load it, whose working directory is not the caller's. ValueError where there is none."""
    where, _, name = plant.rpartition(":")
    if name not in _names(where):
        raise ValueError(f"{plant} {FORM}")
    return f"{Path(where).resolve()}:{name}" if _is_file(where) else plant


def load(plant: str) -> Callable[[], Any]:
    """The function of a plant, its source run: for ranks."""
    where, _, name = plant.rpartition(":")
    return getattr(_loaded(Path(where)) if _is_file(where) else importlib.import_module(where), name)


def in_package() -> list[Plant]:
    """All bugs of `toy_models.planted`, by module: `losses:entropy_is_a_penalty`; mends excluded."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec and spec.submodule_search_locations
    files = [file for place in spec.submodule_search_locations for file in sorted(Path(place).glob("*.py"))]
    kept = [file for file in files if file.stem not in NO_BUGS]
    return [Plant(f"{f.stem}:{name}", f"{PACKAGE}.{f.stem}:{name}", said) for f in kept for name, said in _bugs(f)]


def in_file(file: str) -> list[Plant]:
    """The bugs of a file: its top-level functions that do not begin with `_`. ValueError where there is none."""
    try:
        found = [Plant(f"{file}:{name}", f"{Path(file).resolve()}:{name}", said) for name, said in _bugs(Path(file))]
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as Python: {_why(error)}") from error
    if not found:
        raise ValueError(f"{file} has no bug: no function at its top level whose name does not begin with _")
    return found


def _why(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _bugs(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node) or ""


def _is_file(where: str) -> bool:
    return where.endswith(".py")


def _names(where: str) -> list[str]:
    """The functions at the top level of a module or file, imported ones too; none where there is no such thing."""
    try:
        found = None if _is_file(where) or not where else importlib.util.find_spec(where)
        file = Path(where) if _is_file(where) else Path(found.origin) if found and found.origin else None
        body = ast.parse(file.read_text()).body if file else []
    except (ImportError, OSError, SyntaxError, ValueError):
        return []
    imported = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    made = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [*made, *(alias.asname or alias.name for alias in imported)]


def _loaded(file: Path) -> Any:
    """The module of a file, run once per process; what lies beside it can be imported."""
    name = f"planted_{hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(file.parent))
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
