"""Generated kernels as files: written once by the hash of their content, imported like any module.

They lie in ``FISEDIT_CACHE_DIR``, by default ``fisedit-compile`` in the user's cache folder. ``FISEDIT_DUMP_DIR`` gets
a copy of each one that a process loads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

from fisedit_compile.options import cache_folder

logger = logging.getLogger(__name__)

_loaded: dict[str, ModuleType] = {}
_lock = threading.Lock()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that other processes see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def load_source(name: str, text: str) -> ModuleType:
    """Import generated source.

    Args:
        name: how the file's name starts, a word.
        text: Python source. Equal text gives the same module.

    Returns:
        The module. Triton reads the source of its kernels again, so the file stays.
    """
    key = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with _lock:
        module = _loaded.get(key)
        if module is None:
            module = _loaded[key] = _import(key, text)
    return module


def _import(key: str, text: str) -> ModuleType:
    path = cache_folder() / "kernels" / f"{key}.py"
    # Compared, not trusted: a file that was cut short or edited would compute something else.
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    dump = os.environ.get("FISEDIT_DUMP_DIR")
    if dump:
        write_atomically(Path(dump) / "kernels" / path.name, text)
    specification = importlib.util.spec_from_file_location(f"fisedit_generated_{key}", path)
    if specification is None or specification.loader is None:
        raise ImportError(f"cannot import the generated kernel {path}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    logger.debug("loaded %s", path)
    return module
