"""Which kernels a GPU would choose for a network: found without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import OptionError
from fisedit_compile.operators.triton.chips import KNOWN_CHIPS
from fisedit_compile.reporting.explain import ExplainReport
from fisedit_compile.reporting.kernels import named_chip

H100 = KNOWN_CHIPS[9, 0]


class Network(nn.Module):
    """Three convolutions that are alike, one of stride 2, and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))
        self.down = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(128, 128, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.same:
            x = torch.relu(layer(x))
        return self.grouped(self.down(x))


def report(dtype: torch.dtype = torch.float16) -> ExplainReport:
    module = Network().to(dtype)
    return fisedit.explain(module, torch.zeros(2, 64, 32, 32, dtype=dtype))


def test_problems_are_those_of_the_mask() -> None:
    mask = torch.zeros(32, 32)
    mask[4:12, 8:16] = 1
    same, down, grouped = report().kernel_choices(mask, H100)
    assert [found.count for found in (same, down, grouped)] == [3, 1, 1]
    assert (same.problem.total, same.problem.dense_total) == (2 * 64, 2 * 1024)
    assert (same.problem.inputs, same.problem.outputs, same.problem.taps, same.problem.groups) == (64, 64, 9, 1)
    assert (down.problem.total, down.problem.dense_total, down.problem.outputs) == (2 * 16, 2 * 256, 128)
    assert grouped.problem.groups == 4
    assert same.problem.dtype == torch.float16
    assert [found.whole_map for found in (same, down, grouped)] == [True, False, False]
    spent = same.choice.dense_seconds if same.dense else same.choice.seconds
    assert same.seconds == 3 * spent and down.seconds == down.choice.seconds and not grouped.dense


def test_choices_change_with_the_density() -> None:
    found = report()
    small, large = (found.kernel_choices(density, KNOWN_CHIPS[8, 6])[0] for density in (0.02, 1.0))
    assert small.problem.total < large.problem.total == 2048
    assert small.choice.blocks != large.choice.blocks
    assert small.dense is False


def test_an_empty_mask_and_dtypes_without_kernels_have_no_choices() -> None:
    assert report().kernel_choices(torch.zeros(32, 32), H100) == []
    assert report(torch.bfloat16).kernel_choices(0.5, KNOWN_CHIPS[7, 5]) == []


def test_tables() -> None:
    text = report().describe_kernels(H100)
    assert text.count("Convolutions on H100") == 3 and "ragged mask of 60 %" in text
    assert "64 to 128" in text and "of 2048" in text


@pytest.mark.parametrize("name", ["H100", "h100", "RTX 4090", "rtx4090"])
def test_chips_by_name(name: str) -> None:
    assert named_chip(name).name.lower().replace(" ", "") == name.lower().replace(" ", "")


def test_an_unknown_chip() -> None:
    with pytest.raises(OptionError, match="unknown chip 'V100'; expected one of T4, A100"):
        named_chip("V100")
