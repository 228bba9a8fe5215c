"""What is known of the processor: its name, and what code that was compiled for it depends on."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

#: What Linux tells of the first core, by the names that x86 and ARM use.
CORE = ("model name", "flags", "Features")


@lru_cache(maxsize=1)
def _core() -> dict[str, str]:
    """Lines of ``/proc/cpuinfo`` about the first core by their names; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    first = lines[: lines.index("")] if "" in lines else lines
    return {line.partition("\t")[0]: line for line in first}


@lru_cache(maxsize=1)
def processor_name() -> str:
    """The processor's name."""
    line = _core().get("model name", "")
    return line.partition(":")[2].strip() or platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def processor_features() -> str:
    """What code that was compiled for this processor depends on, in words; only to be compared."""
    known = _core()
    return "\n".join([platform.machine(), platform.processor(), *(known[name] for name in CORE if name in known)])
