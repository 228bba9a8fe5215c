"""Recorded calls, and dense calls inside an edit, give what the network gives, also with convolutions by tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.runtime import Runtime
from support.tolerances import assert_near

SIZE = (6, 8)


class Setting:
    """Convolutions that tiles can compute, compiled so that they do."""

    def __init__(self, channels_last: bool = False) -> None:
        layers = nn.Conv2d(3, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.SiLU(), nn.Conv2d(5, 4, 3, padding=1, bias=False)
        self.module = nn.Sequential(*layers)
        if channels_last:
            self.module.to(memory_format=torch.channels_last)
        self.runtime = Runtime()
        options = {"runtime": self.runtime, "convolution": "tiles"}
        self.compiled = torch.compile(self.module, backend="fisedit", options=options)
        self.inputs = [torch.randn(2, 3, *SIZE) for _ in range(3)]
        (self.program,) = fisedit.explain(self.compiled, self.inputs[0]).programs

    @torch.no_grad()
    def check(self, number: int) -> Tensor:
        """Call the compiled network: it gives what the network gives now."""
        output, expected = self.compiled(self.inputs[number]), self.module(self.inputs[number])
        assert_near(output, expected, f"input {number}")
        assert output.stride() == expected.stride()
        return output


@pytest.mark.parametrize("channels_last", [False, True])
def test_recorded_and_dense_calls_give_what_the_network_gives(channels_last: bool) -> None:
    setting = Setting(channels_last)
    wanted = torch.ops.fisedit.conv_map_tiles.default
    for graph_module in (setting.program.record, setting.program.dense):
        assert graph_module is not None
        assert sum(node.target is wanted for node in graph_module.graph.nodes) == 2
    with setting.runtime.record("base"):
        setting.check(0)
        setting.check(1)
    with setting.runtime.edit("base", save_as="saved"):
        setting.check(1)
        setting.check(2)
    mask = torch.zeros(SIZE)
    mask[2:4, 3:] = 1
    with setting.runtime.edit("base") as run:
        setting.check(2)
        run.set_mask(torch.ones(SIZE))
        setting.check(2)
    with torch.no_grad(), setting.runtime.edit("saved", mask=mask):
        assert_near(setting.compiled(setting.inputs[1]), setting.module(setting.inputs[1]), "nothing changed")
        setting.compiled(setting.inputs[0])


@pytest.mark.parametrize("inside", [True, False], ids=["during a recording", "between recordings"])
def test_recordings_follow_weights_that_change(inside: bool) -> None:
    setting = Setting()
    with setting.runtime.record("base"):
        setting.check(0)
        if inside:
            with torch.no_grad():
                setting.module[0].weight.mul_(2)
            setting.check(0)
    if not inside:
        # Leaves no trace in the version of the parameter.
        setting.module[0].weight.data.mul_(2)
    with setting.runtime.record("base"):
        setting.check(0)
    with setting.runtime.edit("base", mask=torch.ones(SIZE)):
        setting.check(1)
