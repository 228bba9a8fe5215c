"""Which operators kernels compute, and whole edits through them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

import fisedit_compile as fisedit
from fisedit_compile import backend
from fisedit_compile.operators import choosing
from fisedit_compile.operators.choosing import choose, compute, lowered
from fisedit_compile.operators.convolution import triton as conv
from fisedit_compile.operators.convolution.spec import CONV_ROWS, ConvRows
from fisedit_compile.operators.group_norm import triton as norm
from fisedit_compile.operators.library import OPERATORS
from fisedit_compile.operators.triton import devices, working
from support.harness import Case, MaskRecipe, compile_network, recipes
from support.kernel_cases import DEVICE, conv_tensors, normal
from support.networks import ATTENTION, CONVOLUTIONS, NORMS, Network
from support.tape import TapeCapturer
from support.tolerances import assert_near

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="about tensors that no kernel takes")
#: Operators that kernels compute.
COMPUTED = {
    *("attention_rows", "conv_choice", "conv_rows", "gather_rows", "gather_taps", "norm_apply", "norm_partials"),
    "scatter_rows",
}


def who(tensors: tuple) -> str:
    return choose(CONV_ROWS, ConvRows(*tensors)).name


def by_aten(tensors: tuple) -> torch.Tensor:
    (usual, *_) = CONV_ROWS.implementations
    result: torch.Tensor = compute(usual, ConvRows(*tensors))
    return result


@on_cpu
def test_aten_computes_on_the_cpu() -> None:
    assert who(conv_tensors()) == "aten"


def test_triton_computes_where_it_runs(kernels_run: None) -> None:
    assert who(conv_tensors()) == "triton"
    assert lowered(CONV_ROWS) is choosing.function(CONV_ROWS)


def test_kernels_are_asked_first() -> None:
    found = {operator.name for operator in OPERATORS.values() if operator.implementations[-1].name == "triton"}
    assert found == COMPUTED


def test_what_no_kernel_takes_falls_back(kernels_run: None) -> None:
    depthwise = conv_tensors(inputs=16, outputs=16, groups=16)
    double = tuple(
        part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part
        for part in conv_tensors()
    )
    wider = conv_tensors(dtype=torch.float16, recorded_dtype=torch.float32)
    for tensors in (depthwise, double, wider):
        assert who(tensors) == "aten"
        assert_near(lowered(CONV_ROWS)(*tensors), by_aten(tensors))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert who(conv_tensors()) == "aten"
    apart = (*conv_tensors()[:1], torch.empty(2, 30, 20, device="meta"), *conv_tensors()[2:])
    assert working.refusal(apart) == "tensors are on several devices" and who(apart) == "aten"


def test_the_dispatcher_finds_the_kernels(kernels_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs compiled by inductor call operators through it."""
    launched, run = [], conv.run_conv
    monkeypatch.setattr(conv, "run_conv", lambda *given: launched.append(1) or run(*given))
    tensors = conv_tensors()
    assert_near(torch.ops.fisedit.conv_rows(*tensors), by_aten(tensors))
    assert launched == [1]


def test_nothing_imports_triton_early() -> None:
    program = (
        "import sys, torch\n"
        "from fisedit_compile.operators.choosing import lowered\n"
        "from fisedit_compile.operators.convolution.spec import CONV_ROWS\n"
        "lowered(CONV_ROWS)\n"
        # Importing these is what imports Triton for kernels; PyTorch may import it for itself.
        "assert not [name for name in sys.modules if name.endswith('_kernels')]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_triton_aten_computes(monkeypatch: pytest.MonkeyPatch, kernels_run: None) -> None:
    monkeypatch.setattr(devices, "triton_installed", lambda: False)
    assert lowered(CONV_ROWS) is not choosing.function(CONV_ROWS)


def no_compiler(*arguments: object) -> torch.Tensor:
    raise RuntimeError("Failed to find C compiler")


def something_else(map: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return map[:, : index.shape[1]]


@pytest.mark.parametrize(
    ("gather", "reason"),
    [
        (None, None),
        (no_compiler, "RuntimeError: Failed to find C compiler"),
        (something_else, "they compute something else"),
    ],
)
def test_kernels_are_used_where_a_small_one_works(
    gather: object, reason: str | None, kernels_run: None, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(working, "_working", {})
    tensor = normal(1)
    if gather is not None:
        monkeypatch.setattr(working, "small_kernel", gather)
    assert [working.kernels_work(tensor) for _ in range(2)] == [reason is None] * 2
    assert [record.message.partition(": ")[2] for record in caplog.records] == ([] if reason is None else [reason])


def test_nothing_is_tried_while_somebody_captures(kernels_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "_working", {})
    monkeypatch.setattr(devices, "captured", lambda tensor: True)
    assert not working.kernels_work(normal(1)) and not working._working


@on_cpu
def test_the_interpreter_must_be_asked_for_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), devices.interpreter():
        pass


class Block(nn.Module):
    """A residual block: norms, activations, convolutions, an embedding, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.GroupNorm(3, 12)])
        self.shortcut = nn.Conv2d(8, 12, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        hidden = self.first(nn.functional.silu(self.norms[0](x))) + embedding[:, :, None, None]
        hidden = self.second(nn.functional.silu(self.norms[1](hidden)))
        return (self.shortcut(x) + hidden) / 2.0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel is called."""
    counts: dict[str, int] = {}

    def count(module: object, name: str) -> None:
        function = getattr(module, name)

        def run(*arguments: object, **keywords: object) -> object:
            counts[name] = counts.get(name, 0) + 1
            return function(*arguments, **keywords)

        monkeypatch.setattr(module, name, run)

    count(conv, "conv_rows_fused")
    count(norm, "norm_apply")
    count(norm, "norm_update")
    return counts


def test_an_edit_of_a_residual_block_by_fused_kernels(kernels_run: None, counted: dict[str, int]) -> None:
    torch.manual_seed(0)
    block, picture, embedding = Block().to(DEVICE), normal(2, 8, 5, 7), normal(2, 12)
    runtime = fisedit.Runtime()
    compiled = torch.compile(
        block, backend="fisedit", options={"runtime": runtime, "packing": False, "convolution": "rows"}
    )
    mask = torch.zeros(5, 7)
    mask[1:3, 2:4] = 1
    changed = picture + mask.to(DEVICE)
    with torch.no_grad():
        with runtime.record("base"):
            before = compiled(picture, embedding)
        with runtime.edit("base", mask=torch.ones(5, 7)):
            everything = compiled(changed, embedding)
        with runtime.edit("base", mask=mask):
            after = compiled(changed, embedding)
        expected = block(changed, embedding)
    outside = (mask == 0).to(DEVICE)
    assert torch.equal(after[..., outside], before[..., outside])
    assert_near(everything, expected)
    assert not torch.equal(after, before)
    ways = {way: count for way, count in runtime.stats.ways.items() if way.startswith("convolution")}
    assert sum(ways.values()) == 4
    assert all(way.startswith("convolution: kernel ") for way in ways)
    # Two edits of two convolutions, two norms and two statistics each.
    assert counted == {"conv_rows_fused": 4, "norm_apply": 4, "norm_update": 4}


THROUGH_KERNELS = (
    *("convolution grouped", "convolution stride 2", "transposed stride 2"),
    *("group norm", "self-attention", "resnet block"),
)
FOUND = [network for network in (*CONVOLUTIONS, *NORMS, *ATTENTION) if network.name in THROUGH_KERNELS]


def test_the_networks_are_found() -> None:
    assert {network.name for network in FOUND} == set(THROUGH_KERNELS)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("network", FOUND, ids=lambda network: network.name)
@given(recipe=recipes())
def test_edits_by_kernels_equal_the_reference(network: Network, recipe: MaskRecipe) -> None:
    torch.compiler.reset()
    case: Case = compile_network(network, packing=False, traced_once=True)
    mask, inputs = case.mask(recipe), network.inputs(1)
    outputs = case.edit(inputs, mask)
    case.assert_outside_untouched(outputs, mask)
    case.assert_all_near(outputs, case.expected(inputs, mask), "by kernels")


@on_cpu
@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("network", FOUND, ids=lambda network: network.name)
def test_replayed_kernels_read_the_mask_of_their_call(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels resolve once for each mask is resolved by every replay."""
    torch.compiler.reset()
    capturer = TapeCapturer()
    monkeypatch.setattr(backend, "capturer_for", lambda devices: capturer)
    case: Case = compile_network(network, packing=False, traced_once=True)
    first = case.mask(MaskRecipe("rectangle", 1, "same"))
    for number, mask in enumerate([first, first, first.flip(-1), first.flip(-2), first]):
        inputs = network.inputs(1 + number)
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), f"replayed, mask {number}")
    assert capturer.replays >= 3
