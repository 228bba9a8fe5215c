"""The source tree as installed modules: which file is which module, and what each one imports."""

from __future__ import annotations

import ast
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
