"""Timesteps and other numbers of a call that come as Python numbers, not as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import CallMismatchError, FisEditError, ScalarMismatchError
from fisedit_compile.private.dynamo import INTEGERS_CHOOSE_GRAPHS
from support.diffusers_networks import DIFFUSERS
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

MASK = torch.zeros(13, 9, dtype=torch.bool)
MASK[3:8, 2:6] = True

needs_aligned_integers = pytest.mark.skipif(
    not INTEGERS_CHOOSE_GRAPHS, reason="this PyTorch chooses graphs for integers by what ran last: they are refused"
)


class Scaled(nn.Module):
    """A convolution scaled by a function of a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, number: float) -> Tensor:
        return self.inner(x) * torch.tensor(number).float().cos()


class Recorded:
    """The network, compiled, and the two pictures it is called with."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = Scaled().requires_grad_(False)
        self.runtime = fisedit.Runtime()
        self.network = compiled(self.module, self.runtime)

    @staticmethod
    def picture(seed: int, size: tuple[int, int] = (13, 9)) -> Tensor:
        return torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def record(self, numbers: Sequence[float], name: str = "base", size: tuple[int, int] = (13, 9)) -> list[Tensor]:
        with self.runtime.record(name):
            return [self.network(self.picture(step, size), number) for step, number in enumerate(numbers)]

    @torch.no_grad()
    def check_edit(self, numbers: Sequence[float], recorded: Sequence[Tensor], name: str = "base") -> None:
        """Outside the mask the recording; far inside it the dense network."""
        size = recorded[0].shape[2:]
        mask = torch.nn.functional.interpolate(MASK[None, None].float(), tuple(size), mode="nearest")[0, 0] > 0
        outside = ~mask.expand(recorded[0].shape)
        with self.runtime.edit(name, mask=mask, save_as="edited"):
            for step, (number, before) in enumerate(zip(numbers, recorded, strict=True)):
                old, new = self.picture(step, tuple(size)), self.picture(100 + step, tuple(size))
                edited = self.network(new, number)
                assert_identical(edited[outside], before[outside], f"outside, step {step}")
                wanted = self.module(torch.where(mask, new, old), number)
                assert_near(edited[~outside], wanted[~outside], f"inside, step {step}")

    @torch.no_grad()
    def dense(self, numbers: Sequence[float]) -> None:
        for number in numbers:
            self.network(self.picture(0), number)


@needs_aligned_integers
@pytest.mark.parametrize("before", [(), (981,), (981, 721), (500, 400), (721, 981)])
@pytest.mark.parametrize("steps", [(981, 721, 41), (721, 981, 41), (981, 981, 721, 981), (0, 1, 2, 981)])
def test_integers_that_change(steps: tuple[int, ...], before: tuple[int, ...]) -> None:
    """Whatever was compiled before, and however often and in whichever order a number comes."""
    case = Recorded()
    case.dense(before)
    recorded = case.record(steps)
    for _ in range(2):
        case.check_edit(steps, recorded)
    assert case.runtime.stats.calls["dense"] == 0


@needs_aligned_integers
def test_fifty_steps_at_two_resolutions() -> None:
    case = Recorded()
    steps = range(981, 0, -20)
    sizes = {"base": (13, 9), "other": (11, 14)}
    recorded = {name: case.record(steps, name, size) for name, size in sizes.items()}
    for name in ("base", "other", "base"):
        case.check_edit(steps, recorded[name], name)


@needs_aligned_integers
@torch.no_grad()
def test_a_unet_with_integer_timesteps() -> None:
    network = {network.name: network for network in DIFFUSERS}["sd15"]
    module, runtime = network.module().get_submodule("network"), fisedit.Runtime()
    call = compiled(module, runtime)
    steps = (981, 741, 501, 261, 21)
    (old, _, prompt), (new, _, other) = network.inputs(0), network.inputs(1)
    with runtime.record("base"):
        for step in steps:
            call(old, step, encoder_hidden_states=prompt)
    with runtime.edit("base", mask=torch.ones(2, 2)):
        for step in steps:
            expected = module(new, step, encoder_hidden_states=other).sample
            assert_near(call(new, step, encoder_hidden_states=other).sample, expected, f"timestep {step}")


@pytest.mark.parametrize("number", [981, 0.981])
def test_a_number_that_stays(number: float) -> None:
    case = Recorded()
    recorded = case.record([number] * 3)
    case.check_edit([number] * 3, recorded)


@pytest.mark.parametrize("number", [981, 0.981])
def test_another_number_than_recorded(number: float) -> None:
    """It is another graph, or another value of the same one."""
    case = Recorded()
    recorded = case.record([number] * 2)
    for _ in range(2):
        with pytest.raises((CallMismatchError, ScalarMismatchError)):
            case.check_edit([number, number / 3 if isinstance(number, float) else number - 20], recorded)
    if isinstance(number, int) and INTEGERS_CHOOSE_GRAPHS:
        case.check_edit([number] * 2, recorded)


@pytest.mark.parametrize("numbers", [(0.9, 0.6, 0.3), (0.9, 0.9, 0.6, 0.3)])
def test_floats_that_change_are_refused_with_advice(numbers: tuple[float, ...]) -> None:
    """A graph made dynamic takes the first value too, so that its calls need not line up with the recorded ones."""
    case = Recorded()
    with pytest.raises(ScalarMismatchError, match="as a tensor"):
        case.record(numbers)
    assert case.runtime.bases == ()


@pytest.mark.parametrize("number", [981, 0.981])
def test_a_graph_made_in_between_is_right_or_refused(number: float) -> None:
    """Dense calls with other numbers make a graph that may also take the recorded number."""
    case = Recorded()
    recorded = case.record([number])
    case.dense([number / 2 if isinstance(number, float) else number + 20, number])
    try:
        case.check_edit([number], recorded)
    except FisEditError as error:
        assert isinstance(error, CallMismatchError)
        assert "as a tensor" in "\n".join([str(error), *getattr(error, "__notes__", ())])


@torch.no_grad()
def test_integers_are_right_or_refused_whatever_the_version() -> None:
    case = Recorded()
    try:
        recorded = case.record((981, 721, 41))
    except FisEditError as error:
        assert not INTEGERS_CHOOSE_GRAPHS and "as a tensor" in str(error)
        return
    case.check_edit((981, 721, 41), recorded)
