"""Every kernel variant that can be chosen compiles for chips that are not there, and fits them.

HYPOTHESIS_PROFILE=thorough compiles all dtypes and epilogues, which takes some minutes; else one of each kind.
What compiling gave is recorded in golden/resources.json: what did not change since is read from there, but for one
launch of each kernel. FISEDIT_UPDATE_GOLDEN=1 records it anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fisedit_compile.operators.triton.blocks import REGISTERS
from fisedit_compile.operators.triton.chips import KNOWN_CHIPS
from fisedit_compile.operators.triton.devices import triton_installed

RECORD = Path(__file__).parent / "golden" / "resources.json"
UPDATE = os.environ.get("FISEDIT_UPDATE_GOLDEN") == "1"
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not triton_installed():
        pytest.skip("Triton is not installed")
    folder = tmp_path_factory.mktemp("compiled")
    script, output = Path(__file__).parents[2] / "support" / "compiling.py", folder / "resources.json"
    record = folder / "nothing.json" if UPDATE else RECORD
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, str(script), str(output), str(record), *(["--all"] if THOROUGH else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    if UPDATE and not THOROUGH:
        made = {entry["key"]: entry["compiled"] for entry in found}
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(made.items()))
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return found


def failures(compiled: list[dict[str, Any]], holds: Any) -> list[str]:
    return [f"{entry['capability']} {entry['name']}: {entry}" for entry in compiled if not holds(entry)]


def test_everything_is_compiled_for_every_chip(compiled: list[dict[str, Any]]) -> None:
    kernels = {
        *("conv_rows", "add_splits", "gather_kernel", "gather_taps_kernel", "write_kernel"),
        *("partials_kernel", "totals_kernel", "apply_kernel"),
    }
    for capability in KNOWN_CHIPS:
        own = [entry for entry in compiled if tuple(entry["capability"]) == capability]
        assert {entry["kernel"] for entry in own} == kernels
        assert sum(entry["kernel"] == "conv_rows" for entry in own) >= 5


def test_the_record_is_of_these_kernels(compiled: list[dict[str, Any]]) -> None:
    """Where it is not, they were compiled; FISEDIT_UPDATE_GOLDEN=1 records them."""
    needed, known = {entry["key"] for entry in compiled}, set(json.loads(RECORD.read_text(encoding="utf-8")))
    if not any(key.startswith(f"{version('triton')} ") for key in known):
        pytest.skip("recorded with another version of Triton")
    assert needed >= known if THOROUGH else needed == known


def test_registers_suffice(compiled: list[dict[str, Any]]) -> None:
    """Nothing is spilled, and a processor has registers for a whole program."""
    assert not failures(compiled, lambda entry: entry["spilled"] == 0)
    assert not failures(compiled, lambda entry: 0 < entry["registers"] * entry["threads"] <= REGISTERS)


def test_shared_memory_suffices(compiled: list[dict[str, Any]]) -> None:
    """It stays below the chip's limit, and below what the choice of blocks counted on."""
    limits = {list(capability).__repr__(): chip.shared_limit for capability, chip in KNOWN_CHIPS.items()}
    assert not failures(compiled, lambda entry: entry["shared"] <= limits[repr(entry["capability"])])
    convolutions = [entry for entry in compiled if entry["kernel"] == "conv_rows"]
    assert not failures(convolutions, lambda entry: entry["shared"] <= entry["expected_shared"])


def test_convolutions_load_sixteen_bytes_at_once(compiled: list[dict[str, Any]]) -> None:
    """The gathered side too: rows or recorded map, whichever a tap reads."""
    wide = [
        entry
        for entry in compiled
        if entry["kernel"] == "conv_rows" and entry["constants"]["EVEN"] and entry["constants"]["BLOCK_K"] >= 32
    ]
    assert wide and not failures(wide, lambda entry: entry["wide_loads"] >= 2)


def test_tensor_cores_are_used(compiled: list[dict[str, Any]]) -> None:
    halves = [
        entry for entry in compiled if entry["kernel"] == "conv_rows" and not entry["name"].startswith("torch.float32")
    ]
    assert not failures(halves, lambda entry: entry["matrix"] == KNOWN_CHIPS[tuple(entry["capability"])].matrix_units)
