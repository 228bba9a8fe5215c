"""The keys of ``node.meta`` are declared in one file, and written out nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from fisedit_compile.passes.common import meta
from support.tree import PACKAGE, modules

DECLARED = {name: key for name, key in vars(meta).items() if name.isupper() and isinstance(key, str)}
#: ``private``, which may not import passes, reads what Dynamo notes.
APART = (f"{PACKAGE}.private", f"{PACKAGE}.passes.common.meta")
SOURCES = {name: path for name, path in modules().items() if not name.startswith(APART)}


def is_meta(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "meta"


def keys(node: ast.AST) -> list[ast.AST]:
    """The keys that an expression reads from, writes into or looks for in some ``x.meta``."""
    if isinstance(node, ast.Subscript) and is_meta(node.value):
        return [node.slice]
    if isinstance(node, ast.Compare) and is_meta(node.comparators[-1]):
        return [node.left]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_meta(node.func.value):
        if node.func.attr in ("get", "pop", "setdefault"):
            return node.args[:1]
        if node.func.attr == "update":
            given = [key for value in node.args if isinstance(value, ast.Dict) for key in value.keys if key is not None]
            return [*given, *(ast.Constant(keyword.arg) for keyword in node.keywords)]
    return []


def wrong_keys(tree: ast.AST) -> Iterator[str]:
    """Keys that are written out, or are no name that ``meta.py`` declares."""
    looped = {
        loop.target.id
        for loop in ast.walk(tree)
        if isinstance(loop, (ast.For, ast.comprehension)) and isinstance(loop.target, ast.Name)
        if set(map(ast.unparse, loop.iter.elts if isinstance(loop.iter, ast.Tuple) else [loop.iter]))
        <= {*DECLARED, "PROVENANCE"}
    }
    for node in ast.walk(tree):
        for key in keys(node):
            if not (isinstance(key, ast.Name) and key.id in {*DECLARED, *looped}):
                yield f"line {getattr(node, 'lineno', 0)}: {ast.unparse(key)}"


def test_each_key_has_one_name() -> None:
    assert len(set(DECLARED.values())) == len(DECLARED) > 10


@pytest.mark.parametrize("module", SOURCES)
def test_keys_are_declared(module: str) -> None:
    assert list(wrong_keys(ast.parse(SOURCES[module].read_text(encoding="utf-8")))) == []


def test_each_key_is_used() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES.values()]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {name for name in DECLARED if name not in used and DECLARED[name] not in meta.PROVENANCE} == set()


def test_every_way_to_use_a_key_is_seen() -> None:
    text = """
node.meta["spatial"]
node.meta.get("val")
node.meta.pop(key)
"origin" in node.meta
node.meta.update(val=1, **{})
node.meta.update({"changed": True, VALUE: 1})
node.meta[SPATIAL], node.meta.get(ORIGIN), VALUE in node.meta
for name in (SPATIAL, ORIGIN):
    node.meta[name]
for other in (SPATIAL, "new"):
    node.meta[other]
"""
    found = [line.partition(": ")[2] for line in wrong_keys(ast.parse(text))]
    assert sorted(found) == sorted(["'spatial'", "'val'", "key", "'origin'", "'val'", "None", "'changed'", "other"])
