"""Compiled code is compared with exact results before it is trusted, whatever the user's settings are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from fisedit_compile.operators.attention import native as attention
from fisedit_compile.operators.convolution import native as tiles
from fisedit_compile.operators.group_norm import native as norm
from fisedit_compile.operators.native.compiling import DTYPES
from fisedit_compile.operators.products import native as products

pytestmark = pytest.mark.usefixtures("compiler")
#: How each module checks its code anew.
CHECKS: dict[str, Callable[[], object]] = {
    f"{module.__name__.split('.')[-2]} {dtype}": lambda module=module, dtype=dtype: check(module, dtype)
    for module in (attention, norm, products)
    for dtype in DTYPES
} | {"tiles": lambda: tiles._library.__wrapped__()}


def test_every_module_has_checks_of_its_own() -> None:
    assert len(CHECKS) == 3 * len(DTYPES) + 1


def check(module: ModuleType, dtype: torch.dtype) -> object:
    known = module._function if module is attention else module._library
    return known.__wrapped__(dtype)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CHECKS)
def test_right_code_is_trusted_whatever_is_set(name: str, float64_by_default: None) -> None:
    expected = CHECKS[name]() is not None
    # Processors without products of bfloat16 have no code for them.
    assert expected or name == f"products {torch.bfloat16}"
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode():
        assert (CHECKS[name]() is not None) == expected


@pytest.mark.parametrize(
    ("module", "part", "error"),
    [
        (attention, "_call", 1e-3),
        (products, "_multiply", 1e-3),
        (tiles, "_patches", 1e-3),
        (tiles, "_outputs", 1e-2),
        (norm, "_partials", 1e-1),
        (norm, "_updated_totals", 1.0),
        (norm, "_normalise", 1e-2),
    ],
)
def test_wrong_code_is_not(
    module: ModuleType, part: str, error: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = getattr(module, part)

    def wrong(*given: Any) -> torch.Tensor:
        return right(*given) + error

    monkeypatch.setattr(module, part, wrong)
    found = tiles._library.__wrapped__() if module is tiles else check(module, torch.float32)
    assert found is None and "wrong on this machine" in caplog.text
