"""Libraries are compiled once, kept under a name that tells all they depend on, and missing for a reason."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from fisedit_compile.operators.native import compiling
from fisedit_compile.operators.native.compiling import NotCompiledError

#: Without the memory of what was loaded before.
load = compiling.load_library.__wrapped__
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiling.COMPILERS)), reason="there is no C++ compiler on this machine"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("FISEDIT_NATIVE", raising=False)
    return tmp_path / "cache" / "native"


def script(path: Path, lines: str) -> Path:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@needs_compiler
def test_compiles_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("attention")
    (made,) = folder.iterdir()
    assert made.name.startswith("attention_") and made.suffix == ".so"
    monkeypatch.setattr(compiling, "_compile", lambda *_: pytest.fail("compiled again"))
    assert load("attention").attention is not None
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        load("attention", "BFLOAT16")


@needs_compiler
def test_another_processor_or_compiler_is_another_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("attention")
    monkeypatch.setattr(compiling, "processor_features", lambda: "another")
    load("attention")
    monkeypatch.setattr(compiling, "FLAGS", (*compiling.FLAGS, "-O2"))
    load("attention")
    assert len(list(folder.iterdir())) == 3


def test_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_NATIVE", "0")
    with pytest.raises(NotCompiledError, match="FISEDIT_NATIVE=0 switches"):
        load("attention")
    assert not folder.exists()


def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotCompiledError, match=r"no C\+\+ compiler was found \(tried g\+\+, clang\+\+, c\+\+"):
        load("attention")
    monkeypatch.setenv("CXX", "nowhere-to-be-found")
    with pytest.raises(NotCompiledError, match=r"tried nowhere-to-be-found"):
        load("attention")
    monkeypatch.setenv("CXX", 'g++ "-O3')
    with pytest.raises(NotCompiledError, match="CXX names no command"):
        load("attention")


def test_a_folder_that_cannot_be_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError("not yours")

    monkeypatch.setenv("CXX", str(script(tmp_path / "compiler", "echo 1")))
    with monkeypatch.context() as patch:
        patch.setattr(compiling.Path, "is_file", refuse)
        with pytest.raises(NotCompiledError, match="cannot read .*not yours"):
            load("attention")


def test_a_compiler_that_fails_says_why(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = script(
        tmp_path / "compiler", 'if [ "$1" = --version ]; then echo 1; else echo "no such flag" >&2; exit 1; fi'
    )
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(NotCompiledError, match="no such flag"):
        load("attention")
    assert list(folder.iterdir()) == []


def test_a_library_that_cannot_be_loaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = script(
        tmp_path / "compiler",
        'while [ "$#" -gt 0 ]; do if [ "$1" = -o ]; then echo nothing > "$2"; fi; shift; done',
    )
    monkeypatch.setenv("CXX", str(writing))
    with pytest.raises(NotCompiledError, match="cannot load"):
        load("attention")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("FISEDIT_NATIVE", raising=False)
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", str(script(tmp_path / "compiler", "echo 1")))
    with pytest.raises(NotCompiledError, match="cannot write"):
        load("attention")
