"""The source tree as installed modules: which file is which module, and what each one imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "fisedit_compile"
#: Folders of the checkout and the packages they are installed as.
FOLDERS = {"fisedit_compile": PACKAGE, "passes": f"{PACKAGE}.passes", "runtime": f"{PACKAGE}.runtime"}


def installed_files(root: Path = ROOT) -> dict[str, Path]:
    """Every file that an installation must contain, by its installed path."""
    found = {}
    for folder, package in FOLDERS.items():
        target = Path(*package.split("."))
        for path in sorted((root / folder).rglob("*")):
            inner = path.relative_to(root / folder)
            data = path.name == "py.typed" or inner.parts[:2] == ("scenes", "weights")
            if path.is_file() and "__pycache__" not in path.parts and (path.suffix in (".py", ".cpp", ".h") or data):
                found[str(target / inner)] = path
    return found


def modules() -> dict[str, Path]:
    """Every module by its installed name."""
    found = {}
    for name, path in installed_files().items():
        if name.endswith(".py"):
            found[name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = path
    return found


@dataclass(frozen=True)
class Import:
    """``name`` is the module that ``line`` of a file imports, or an attribute of a module."""

    name: str
    line: int


def imports(module: str, path: Path) -> Iterator[Import]:
    """All imports of a file, those inside functions and for type checking too; relative ones made absolute.

    ``from a import b`` counts as ``a.b``, because ``b`` may be a module.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*base, *source.split(".")] if source else base)
            yield from (Import(f"{source}.{alias.name}", node.lineno) for alias in node.names)


PRIVATE = re.compile(r"(?:[a-z]\w*\.)*_[a-z]\w*(?:\.\w+)*", re.IGNORECASE)
"""What reads as a private name, or a path to one."""

NAMED_TUPLE = frozenset({"_asdict", "_field_defaults", "_fields", "_make", "_replace"})
"""Documented names of Python's named tuples, with an underscore so that they differ from fields."""

OPERATORS = ("aten", "torch.ops.aten")
"""Where PyTorch's operators are: those are public, whatever their names."""

TEXT = frozenset(
    {"endswith", "partition", "removeprefix", "removesuffix", "replace", "rpartition", "split", "startswith"}
)
"""Methods of texts; what they are given is no name."""


def defined_names(path: Path) -> frozenset[str]:
    """The private names that a file gives to what it defines: functions, classes, variables, attributes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            found.add(node.attr)
    return frozenset(name for name in found if PRIVATE.fullmatch(name))


def private_uses(path: Path, defined: frozenset[str]) -> Iterator[Import]:
    """Every private name that a file reads or writes of what is not its own: attributes, and texts that are such names.

    Args:
        path: of the file.
        defined: the private names that objects of this package have, wherever they are defined.
    """
    here = defined_names(path) | NAMED_TUPLE
    tree = ast.parse(path.read_text(encoding="utf-8"))
    harmless = {id(text) for node in ast.walk(tree) for text in _texts(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            owner = ast.unparse(node.value)
            known = here | defined if _is_own(node.value) else here
            if node.attr not in known and owner not in OPERATORS:
                yield Import(f"{owner}.{node.attr}", node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in harmless:
            if PRIVATE.fullmatch(node.value) and node.value not in here:
                yield Import(node.value, node.lineno)


def _is_own(owner: ast.expr) -> bool:
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls")


def _texts(node: ast.AST) -> list[ast.expr]:
    """Parts of composed texts, and arguments of methods of texts."""
    if isinstance(node, ast.JoinedStr):
        return node.values
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TEXT
    return node.args if isinstance(node, ast.Call) and called else []


def dotted_names(path: Path) -> Iterator[Import]:
    """Every name with dots that a file reads, such as ``torch.ops.aten``."""

    def spell(node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            inner = spell(node.value)
            return None if inner is None else f"{inner}.{node.attr}"
        return None

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and (name := spell(node)) is not None:
            yield Import(name, node.lineno)
