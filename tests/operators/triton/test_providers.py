"""Who computes an operator, and whole edits through the kernels."""

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
from fisedit_compile.operators import IMPLEMENTATIONS
from fisedit_compile.operators.convolution import triton as conv
from fisedit_compile.operators.group_norm import triton as norm
from fisedit_compile.operators.triton import devices, implementation, providers
from fisedit_compile.operators.triton.providers import PROVIDERS, Provider, provider_of, register
from support.harness import Case, MaskRecipe, compile_network, recipes
from support.kernel_cases import DEVICE, conv_tensors, normal, positions
from support.networks import ATTENTION, CONVOLUTIONS, NORMS, Network
from support.tape import TapeCapturer
from support.tolerances import assert_near

CONV = torch.ops.fisedit.conv_rows.default
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="about tensors that no kernel takes")


@on_cpu
def test_aten_computes_on_the_cpu() -> None:
    assert implementation(CONV) is IMPLEMENTATIONS[CONV] or torch.cuda.is_available()
    assert provider_of(CONV, *conv_tensors()).name == "aten"


def test_triton_computes_where_it_runs(kernels_run: None) -> None:
    assert provider_of(CONV, *conv_tensors()).name == "triton"
    assert implementation(CONV) is not IMPLEMENTATIONS[CONV]
    totals = torch.ops.fisedit.norm_totals.default
    assert totals not in PROVIDERS and implementation(totals) is IMPLEMENTATIONS[totals]


def test_what_no_kernel_takes_falls_back(kernels_run: None) -> None:
    depthwise = conv_tensors(inputs=16, outputs=16, groups=16)
    double = tuple(
        part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part
        for part in conv_tensors()
    )
    wider = conv_tensors(dtype=torch.float16, recorded_dtype=torch.float32)
    for tensors in (depthwise, double, wider):
        assert provider_of(CONV, *tensors).name == "aten"
        assert_near(implementation(CONV)(*tensors), IMPLEMENTATIONS[CONV](*tensors))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert provider_of(CONV, *conv_tensors()).name == "aten"


def test_the_first_provider_that_supports_the_arguments_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "PROVIDERS", {})
    operator = torch.ops.fisedit.gather_rows.default
    register(operator, Provider("first", lambda map, index: map.shape[0] == 1, lambda map, index: "first"))
    register(operator, Provider("second", lambda map, index: map.shape[0] < 3, lambda map, index: "second"))
    names = [provider_of(operator, normal(batch, 4, 2), positions(1, 2, 4)).name for batch in (1, 2, 3)]
    assert names == ["first", "second", "aten"]
    with pytest.raises(KeyError, match="is no operator of fisedit"):
        register(torch.ops.aten.add.Tensor, Provider("none", lambda *_: True, lambda *_: None))


def test_the_dispatcher_knows_the_kernels() -> None:
    """Graphs compiled by inductor call operators through it."""
    for overload in PROVIDERS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CUDA")
    others = set(IMPLEMENTATIONS) - set(PROVIDERS)
    assert others and not any(
        torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CUDA") for overload in others
    )


def test_nothing_imports_triton_early() -> None:
    program = (
        "import sys, torch\n"
        "from fisedit_compile.operators.triton import implementation\n"
        "implementation(torch.ops.fisedit.conv_rows.default)\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_triton_aten_computes(monkeypatch: pytest.MonkeyPatch, kernels_run: None) -> None:
    monkeypatch.setattr(devices, "triton_installed", lambda: False)
    assert implementation(CONV) is IMPLEMENTATIONS[CONV]


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
    monkeypatch.setattr(providers, "_working", {})
    tensor = normal(1)
    if gather is not None:
        monkeypatch.setattr(providers.rows, "gather_rows", gather)
    assert [providers.kernels_work(tensor) for _ in range(2)] == [reason is None] * 2
    assert [record.message.partition(": ")[2] for record in caplog.records] == ([] if reason is None else [reason])


def test_nothing_is_tried_while_somebody_captures(kernels_run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_working", {})
    monkeypatch.setattr(devices, "captured", lambda tensor: True)
    assert not providers.kernels_work(normal(1)) and not providers._working


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
    case: Case = compile_network(network, packing=False)
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
    case: Case = compile_network(network, packing=False)
    first = case.mask(MaskRecipe("rectangle", 1, "same"))
    for number, mask in enumerate([first, first, first.flip(-1), first.flip(-2), first]):
        inputs = network.inputs(1 + number)
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), f"replayed, mask {number}")
    assert capturer.replays >= 3
