"""New masks never compile anything."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from fisedit_compile import backend, passes
from fisedit_compile.executing import executable, lowering
from support.composite_networks import COMPOSITES
from support.harness import MaskRecipe, compile_network
from support.shape_networks import BLOCKS

ALL = {network.name: network for network in (*BLOCKS, *COMPOSITES)}
KINDS = ("ragged", "sparse", "rectangle", "pixel", "border", "per-sample", "full")


class Counter:
    """Counts the calls of a function it stands in for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *modules: ModuleType) -> None:
        self.calls = 0

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            return function(*arguments, **keywords)

        self.places = 0
        for module in modules:
            for name, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, name, counted)
                    self.places += 1


def test_fifty_masks_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (backend, executable, lowering, passes)
    lowerings = Counter(monkeypatch, lowering.lower, *modules)
    programs = Counter(monkeypatch, passes.build_program, *modules)
    assert lowerings.places and programs.places
    case = compile_network(ALL["skip network strided"])
    inputs = case.network.inputs(1)
    case.edit(inputs, case.mask(MaskRecipe("ragged", 1)))
    with case.runtime.edit("base", mask=case.mask(MaskRecipe("ragged", 1)), save_as="next"):
        case.call(inputs)
    case.edit(inputs, case.mask(MaskRecipe("full")))
    before = (lowerings.calls, programs.calls)
    assert min(before) >= 1, "the counters count nothing"
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(50):
            mask = case.mask(MaskRecipe(KINDS[seed % len(KINDS)], seed))
            with case.runtime.edit("base", mask=mask, save_as="next" if seed % 10 == 0 else None):
                outputs = case.call(inputs)
            case.assert_outside_untouched(outputs, mask)
            if seed % 10 == 0:
                case.assert_all_near(outputs, case.expected(inputs, mask), f"mask {seed}")
    assert (lowerings.calls, programs.calls) == before


def test_inductor_lowering_is_the_masked_reference() -> None:
    """The edit graph compiled by inductor, for masks of several sizes."""
    case = compile_network(ALL["resnet block"], lowering="inductor")
    inputs = case.network.inputs(1)
    for kind in ("ragged", "per-sample", "pixel", "full"):
        mask = case.mask(MaskRecipe(kind, 3))
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), f"inductor, {kind}")
    unchanged = case.edit(case.network.inputs(0), case.mask(MaskRecipe("ragged", 5)))
    case.assert_all_near(unchanged, case.recorded, "unchanged inputs")
