"""Convolutions that may run on the whole map: the verdict of the choice decides, results are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional

from fisedit_compile.operators import choosing, conv_choice, pack_conv_weight
from fisedit_compile.operators.convolution import aten as by_aten
from fisedit_compile.operators.convolution import triton as conv
from fisedit_compile.operators.convolution.spec import CONV_CHOICE, ConvChoice
from fisedit_compile.operators.triton import devices, fusion
from fisedit_compile.operators.triton.blocks import BlockChoice, ConvProblem, choose
from fisedit_compile.operators.triton.chips import KNOWN_CHIPS
from fisedit_compile.runtime.spec import Domain
from support.kernel_cases import DEVICE
from support.sparse_maps import Case, masks, window
from support.tolerances import assert_near

fisedit, aten = torch.ops.fisedit, torch.ops.aten
CHANNELS, OUTPUTS = 8, 16


class Setting:
    """A mask on a map of any size, and the arguments of ``conv_choice`` on a GPU."""

    def __init__(self, data: st.DataObject) -> None:
        domain = Domain(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
        batch = data.draw(st.integers(1, 2))
        self.case = Case.build(data.draw(masks(domain, batch)), window(domain), batch, CHANNELS)
        self.weight = torch.randn(OUTPUTS, CHANNELS, 3, 3)
        self.bias = data.draw(st.sampled_from([None, torch.randn(OUTPUTS)]))
        self.size = (domain.height, domain.width)
        self.residual = torch.randn(batch, self.case.rows.shape[1], OUTPUTS)

    def arguments(self) -> tuple[Any, ...]:
        case = self.case
        packed = pack_conv_weight(self.weight, False, 1)
        tensors = [
            case.rows.float(),
            case.recorded.float().contiguous(),
            case.taps("halo"),
            case.taps("table"),
            packed,
            self.bias,
        ]
        whole = [case.source("index"), case.source("valid"), self.weight]
        here = [None if tensor is None else tensor.to(DEVICE) for tensor in (*tensors, *whole)]
        return (*here[:6], [], [], *here[6:], *self.size)

    def check(self, result: Tensor, follow: bool = False) -> None:
        """Valid rows are those of the dense convolution."""
        bias = None if self.bias is None else self.bias.double()
        map = functional.conv2d(self.case.dense_mixed().double(), self.weight.double(), bias, padding=1)
        expected = self.case.target_rows(map)
        if follow:
            expected = functional.silu(expected + self.residual)
        valid = self.case.source("valid")
        result = result.cpu().double()
        if valid is not None:
            inside = valid.expand(result.shape[0], -1)[..., None]
            result, expected = torch.where(inside, result, 0), torch.where(inside, expected, 0)
        assert result.shape == expected.shape
        assert_near(result.float(), expected.float(), dtype=torch.float32)


def verdict(patch: pytest.MonkeyPatch, dense: bool) -> list[ConvProblem]:
    """Make every choice say so; the problems that were asked about."""
    asked: list[ConvProblem] = []

    def best(problem: ConvProblem, chip: Any, work: Any = None) -> BlockChoice:
        asked.append(problem)
        return BlockChoice(choose(problem, chip).blocks, 2.0 if dense else 1.0, 1.5)

    patch.setattr(conv, "best_choice", best)
    return asked


@pytest.mark.parametrize("dense_from", [0.0, 2.0])
@given(data=st.data())
def test_without_kernels_the_density_decides(data: st.DataObject, dense_from: float) -> None:
    setting, expected = Setting(data), "dense" if dense_from == 0.0 else "rows"
    given_arguments = ConvChoice(*setting.arguments())
    with pytest.MonkeyPatch.context() as patch, choosing.taken.apart() as counts:
        patch.setattr(by_aten, "DENSE_FROM", dense_from)
        # On a GPU there are kernels.
        patch.setattr(devices, "runs_on", lambda tensor: False)
        assert choosing.choose(CONV_CHOICE, given_arguments).name == expected
        setting.check(conv_choice(*given_arguments))
    assert counts == {f"convolution: {expected}": 2}


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("dense", [False, True])
@given(data=st.data())
def test_by_kernels_the_verdict_decides(data: st.DataObject, dense: bool) -> None:
    setting, launched = Setting(data), []
    arguments = setting.arguments()
    with pytest.MonkeyPatch.context() as patch:
        asked = verdict(patch, dense)
        run = conv.run_conv
        patch.setattr(conv, "run_conv", lambda *given: launched.append(1) or run(*given))
        assert choosing.choose(CONV_CHOICE, ConvChoice(*arguments)).name == ("dense" if asked and dense else "triton")
        setting.check(choosing.lowered(CONV_CHOICE)(*arguments))
    rows = arguments[3].shape[1]
    assert bool(launched) == (not dense or rows == 0)
    assert not asked or asked[0].total == arguments[0].shape[0] * rows


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("dense", [False, True])
@given(data=st.data())
def test_what_follows_is_fused_or_runs_after_the_dense_convolution(data: st.DataObject, dense: bool) -> None:
    setting, launched = Setting(data), []
    arguments = (*setting.arguments(), setting.residual.to(DEVICE))
    graph = fx.Graph()
    # Constants and lists stay arguments of the node.
    nodes = [
        graph.placeholder(f"input_{at}") if isinstance(value, Tensor) else value for at, value in enumerate(arguments)
    ]
    node = graph.call_function(fisedit.conv_choice.default, tuple(nodes[:-1]))
    added = graph.call_function(aten.add.Tensor, (node, nodes[-1]))
    graph.output(graph.call_function(aten.silu.default, (added,)))
    module = fusion.fuse(fx.GraphModule({}, graph))
    module.recompile()
    calls = [node.target.__name__ for node in module.graph.nodes if node.op == "call_function"]
    assert calls == ["conv_rows_and_more"]
    with pytest.MonkeyPatch.context() as patch:
        verdict(patch, dense)
        run = conv.run_conv
        patch.setattr(conv, "run_conv", lambda *given: launched.append(1) or run(*given))
        setting.check(module(*[value for value in arguments if isinstance(value, Tensor)]), follow=True)
    assert bool(launched) == (not dense or arguments[3].shape[1] == 0)


@given(data=st.data())
def test_choices_of_a_processor_are_not_for_kernels(data: st.DataObject) -> None:
    arguments = list(Setting(data).arguments())
    arguments[6] = [torch.zeros(1, 1, dtype=torch.int64)] * 4
    assert "for processors" in (conv.supports_choice(ConvChoice(*arguments)) or "")


@pytest.mark.parametrize("chip", [(8, 0), (9, 0)])
@pytest.mark.parametrize("channels", [320, 640])
def test_the_verdict_is_sparse_for_small_edits_and_dense_for_whole_pictures(
    chip: tuple[int, int], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "chip_of", lambda device: KNOWN_CHIPS[chip])

    def dense(count: int) -> bool:
        with torch.device("meta"):
            rows = torch.empty(2, count, channels, dtype=torch.float16)
            recorded, table = torch.empty(2, 4096, channels), torch.empty(1, count, 9, dtype=torch.int64)
            weight = torch.empty(channels, 9 * channels, dtype=torch.float16)
            whole = torch.empty(channels, channels, 3, 3, dtype=torch.float16)
            index = torch.empty(1, count, dtype=torch.int64)
        arguments = (rows, recorded, index, table, weight, None, [], [], index, None, whole, 64, 64)
        return conv.prefers_dense(ConvChoice(*arguments))

    assert not dense(200) and dense(4096)
    assert not dense(0)
