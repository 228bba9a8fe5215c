"""Whatever way operators are computed in, an edit means the same."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fisedit_compile.operators.attention import native
from fisedit_compile.options import parse_options
from fisedit_compile.passes import SparseProgram
from fisedit_compile.reporting.explain import explain_with
from support.choices import favour
from support.composite_networks import COMPOSITES
from support.diffusers_networks import DIFFUSERS
from support.harness import Case, MaskRecipe, compile_network
from support.networks import Network
from support.shape_networks import BLOCKS
from support.tolerances import assert_identical

ALL = {network.name: network for network in (*BLOCKS, *COMPOSITES, *DIFFUSERS)}
RECIPES = (MaskRecipe("ragged", 3), MaskRecipe("per-sample", 5), MaskRecipe("pixel", 7), MaskRecipe("full"))
#: Options, and the operator that must then be in the edit graph of networks with even resolutions.
PATHS = {
    "tiles": ({"convolution": "tiles"}, "conv_tiles"),
    "dense": ({"convolution": "dense"}, "conv_dense"),
    "rows": ({"convolution": "rows"}, "conv_rows"),
    "not packed": ({"packing": False}, "linear"),
    "few packed": ({"packing": 4096}, "linear"),
    "packed where faster": ({"packing": "auto"}, "linear_rows"),
    "nothing hoisted": ({"disable_passes": "hoist_invariants"}, "linear_rows"),
}


def operators_of(network: Network, options: dict[str, Any]) -> set[str]:
    """Names of the operators in a network's edit graph."""
    (program,) = explain_with(parse_options(None, options)[1], network.module(), *network.inputs(0)).programs
    assert isinstance(program, SparseProgram)
    return {node.target._opname for node in program.edit.graph.nodes if hasattr(node.target, "_opname")}


NAMES = ("skip network strided", "skip network wide", "transformer block", "timed")
# The blocks of the large network are those of the small ones; bfloat16 is slow to compute on most processors.
LARGE = [("sd15", torch.float32)]
if os.environ.get("HYPOTHESIS_PROFILE") == "thorough":
    LARGE.append(("sd15", torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "dtype"),
    LARGE + [(name, dtype) for name in NAMES for dtype in (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_path(path: str, name: str, dtype: torch.dtype) -> None:
    options, operator = PATHS[path]
    case = compile_network(ALL[name], dtype=dtype, traced_once=True, **options)
    if dtype is torch.float32 and name == "skip network strided":
        assert operator in operators_of(ALL[name], options)
    check_edits(case, path)


def check_edits(case: Case, path: str) -> None:
    """What an edit promises, with masks of all kinds."""
    dtype = case.recorded[0].dtype
    inputs = case.network.inputs(1, dtype)
    for recipe in RECIPES:
        mask = case.mask(recipe)
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), f"{path}, {recipe}")
        unchanged = case.edit(case.network.inputs(0, dtype), mask)
        case.assert_all_near(unchanged, case.recorded, f"{path}, unchanged, {recipe}")
    empty = case.edit(inputs, torch.zeros(case.network.resolution))
    for output, recorded in zip(empty, case.recorded, strict=True):
        assert_identical(output, recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["transformer block", "sd15"])
@pytest.mark.parametrize("way", ["plain", "compiled"])
def test_attention(way: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if native._function(dtype) is None:
        pytest.skip("there is no compiled attention on this machine")
    favour(monkeypatch, way, runs=False)
    case = compile_network(ALL[name], dtype=dtype, traced_once=True)
    check_edits(case, f"{way} attention")
    assert case.runtime.stats.ways[f"attention: {way}"] > 0
