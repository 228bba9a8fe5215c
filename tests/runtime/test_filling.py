"""Recorded calls that filled what a network keeps: what is kept of them, and whose results are theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fisedit_compile.errors import WeightsChangedError
from fisedit_compile.runtime.base import ProgramKey, RecordedCall
from fisedit_compile.runtime.filling import FillingCall, recorded_outputs
from fisedit_compile.runtime.fingerprint import Fingerprint, Weights


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300,), (4, 5), (7,), (2, 3, 2)]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [*found, torch.arange(9), found[0].half()]


@pytest.mark.parametrize("numbers", [(0,), (2, 0), (5, 4, 1), (0, 1, 2, 3, 4, 5), ()])
def test_a_part_of_a_fingerprint_is_that_of_the_part(numbers: tuple[int, ...]) -> None:
    all_of_them = tensors()
    chosen = [all_of_them[number] for number in numbers]
    part = Fingerprint.take(all_of_them).part(numbers)
    assert part == Fingerprint.take(chosen)
    for place in range(len(numbers)):
        changed = [value.clone() for value in chosen]
        changed[place].view(-1)[-1] += 1
        difference = part.difference(Fingerprint.take(changed))
        assert difference is not None and f"parameter {place} " in difference


def test_some_of_the_weights_are_verified() -> None:
    values = [nn.Parameter(value) for value in tensors()[:4]]
    weights = Weights(values)
    weights.verify([values[3], values[1]], "base", (3, 1))
    assert weights.are([values[3], values[1]], (3, 1)) and not weights.are([values[1], values[3]], (3, 1))
    with pytest.raises(WeightsChangedError, match="another network: parameter 3"):
        weights.verify([values[1]], "base", (3,))
    values[1].data[0, 0] += 1
    weights.verify([values[3]], "base", (3,))
    with pytest.raises(WeightsChangedError, match="the weights changed"):
        weights.verify([values[3], values[1]], "base", (3, 1))


def filling(*names: str) -> FillingCall:
    return FillingCall(ProgramKey("first", ()), 0, {"x": torch.zeros(2, 3), "t": 4}, names)


def test_parameters_that_two_graphs_share_are_found_by_name() -> None:
    assert filling("a", "b", "c").shared_parameters(["c", "new", "a"]) == ((0, 2), (2, 0))
    assert filling("a").shared_parameters(["b"]) == ((), ())


def test_bytes_of_what_is_kept() -> None:
    assert filling().bytes == 24 and len(list(filling().tensors())) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_outputs_are_found_among_those_of_the_recorded_call(dtype: torch.dtype) -> None:
    first, second = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2))
    stored = {f"output:{number}": value for number, value in enumerate([second, first, second])}
    call = RecordedCall({"conv:map": first, **stored}, ())
    rounded = (first.to(torch.complex128) * (1 + 1e-7)).to(dtype) if dtype.is_complex else first * (1 + 1e-7)
    assert recorded_outputs(call, [rounded, second]) == ["output:1", "output:2"]
    assert recorded_outputs(call, [second]) == ["output:0"]
    assert recorded_outputs(call, []) == []
    assert recorded_outputs(call, [first * 1.2]) is None
    assert recorded_outputs(call, [first, first]) is None
    assert recorded_outputs(call, [first.flatten()]) is None


def test_what_is_no_number_must_be_so_in_both() -> None:
    value = torch.tensor([1.0, float("nan"), float("inf")])
    call = RecordedCall({"output:0": value}, ())
    assert recorded_outputs(call, [value.clone()]) == ["output:0"]
    assert recorded_outputs(call, [value.nan_to_num()]) is None
    names = RecordedCall({"output:0": torch.tensor([1, 2])}, ())
    assert recorded_outputs(names, [torch.tensor([1, 2])]) == ["output:0"]
    assert recorded_outputs(names, [torch.tensor([1, 3])]) is None
