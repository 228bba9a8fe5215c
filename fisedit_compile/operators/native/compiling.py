"""From C++ source in this package to a loaded library, compiled once for each machine.

Libraries lie in ``FISEDIT_CACHE_DIR``, by default ``fisedit-compile`` in the user's cache folder, named by a hash of
the source, the compiler and the processor. ``CXX`` names the compiler; otherwise the first of :data:`COMPILERS` that is
found is taken. ``FISEDIT_NATIVE=0`` switches compiled code off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch

from fisedit_compile.operators.processor import processor_features
from fisedit_compile.options import cache_folder

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++", "c++")
#: No fast mathematics: rounding by adding and subtracting, NaN and infinity keep their meaning.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
#: Seconds after which a compiler is given up.
PATIENCE = 120
#: Macros by dtype, and how far from exact ones results of size one may lie for code to be trusted.
DTYPES: dict[torch.dtype, tuple[tuple[str, ...], float]] = {
    torch.float32: ((), 1e-5),
    torch.bfloat16: (("BFLOAT16",), 2e-2),
}


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is computed inside depends on no setting of the user's: autocast, gradients, devices."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


class NotCompiledError(Exception):
    """There is no library; the message says why."""


def _compiler() -> list[str]:
    """The command that compiles.

    Raises:
        NotCompiledError: none is found.
    """
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise NotCompiledError(f"the variable CXX names no command: {error}") from error
    names = [given[0]] if given else COMPILERS
    for name in names:
        found = shutil.which(name)
        if found:
            return [found, *given[1:]]
    raise NotCompiledError(f"no C++ compiler was found (tried {', '.join(names)}; the variable CXX names another)")


def _run(command: Sequence[str]) -> str:
    """What a command prints.

    Raises:
        NotCompiledError: it cannot be run, takes too long, or fails; with the end of what it printed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCompiledError(f"cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        raise NotCompiledError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _compile(source: bytes, command: Sequence[str], path: Path) -> None:
    """Write the library so that other processes see all of it or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            text, library = Path(folder, "source.cpp"), Path(folder, path.name)
            text.write_bytes(source)
            _run([*command, "-o", str(library), str(text)])
            library.replace(path)
    except OSError as error:
        raise NotCompiledError(f"cannot write {path}: {error}") from error


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise NotCompiledError(f"cannot read {path}: {error}") from error


@lru_cache(maxsize=16)
def load_library(name: str, *definitions: str) -> ctypes.CDLL:
    """Compile ``native.cpp`` of an operator, unless that was done before, and load it.

    Args:
        name: of the operator's folder; what ``vectors.h`` defines comes before its source.
        definitions: macros that are defined.

    Raises:
        NotCompiledError: compiled code is switched off, there is no compiler, or it failed.
    """
    if os.environ.get("FISEDIT_NATIVE", "1") == "0":
        raise NotCompiledError("FISEDIT_NATIVE=0 switches compiled code off")
    folder = resources.files("fisedit_compile.operators")
    source = b"".join(folder.joinpath(*file).read_bytes() for file in (("native", "vectors.h"), (name, "native.cpp")))
    compiler = _compiler()
    command = [*compiler, *FLAGS, *(f"-D{definition}" for definition in definitions)]
    described = "\0".join([*command, _run([*compiler, "--version"]), processor_features()])
    key = hashlib.sha256(source + described.encode()).hexdigest()[:16]
    path = cache_folder() / "native" / f"{'_'.join((name, *definitions))}_{key}.so"
    if not _is_there(path):
        _compile(source, command, path)
        logger.info("compiled %s", path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotCompiledError(f"cannot load {path}: {error}") from error
