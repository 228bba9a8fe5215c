"""The ways in which users call a compiled network, and the forms in which masks and inputs come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fisedit_compile as fisedit
from support.composite_networks import COMPOSITES
from support.diffusers_networks import DIFFUSERS
from support.harness import Case, MaskRecipe, compile_network, compiled, outputs_of, reference_of
from support.shape_networks import BLOCKS
from support.tolerances import assert_near

ALL = {network.name: network for network in (*BLOCKS, *COMPOSITES, *DIFFUSERS)}
RAGGED, PIXEL = MaskRecipe("ragged", 3), MaskRecipe("pixel", 40)


def test_the_default_runtime_and_module_compile() -> None:
    network = ALL["group norm"]
    runtime = fisedit.default_runtime()
    assert runtime is fisedit.default_runtime()
    module = network.module()
    module.compile(backend="fisedit")
    with runtime.record("base"):
        outputs_of(module, network.inputs(0))
    mask, reference = RAGGED.draw(network.resolution), reference_of(network)
    try:
        with runtime.edit("base", mask=mask):
            (output,) = outputs_of(module, network.inputs(1))
    finally:
        runtime.drop("base")
    (expected,) = reference.edit(reference.record(network.inputs(0)), network.inputs(1), mask).outputs
    assert_near(output, expected, "default runtime")


@pytest.mark.parametrize("form", ["uint8", "float", "numpy", "pil", "bool"])
def test_masks_of_every_form(form: str) -> None:
    case = compile_network(ALL["two convolutions"], traced_once=True)
    mask, inputs = case.mask(RAGGED), case.network.inputs(1)
    expected = case.expected(inputs, mask)
    given: Any = mask
    if form == "uint8":
        given = mask.to(torch.uint8) * 255
    elif form == "float":
        given = mask.float() * 0.7
    elif form == "numpy":
        given = mask.numpy()
    elif form == "pil":
        from PIL import Image

        given = Image.fromarray((mask.to(torch.uint8) * 255).numpy())
    with case.runtime.edit("base", mask=given):
        case.assert_all_near(case.call(inputs), expected, form)


def test_channels_last_inputs() -> None:
    network = ALL["transformer block"]
    runtime, reference = fisedit.Runtime(), reference_of(network)
    module = compiled(
        network.module().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        runtime,
    )

    def arranged(seed: int) -> tuple[Tensor, ...]:
        x, *others = network.inputs(seed)
        return (x.contiguous(memory_format=torch.channels_last), *others)

    with runtime.record("base"):
        outputs_of(module, arranged(0))
    mask = RAGGED.draw(network.resolution)
    with runtime.edit("base", mask=mask):
        (output,) = outputs_of(module, arranged(1))
    (expected,) = reference.edit(reference.record(network.inputs(0)), network.inputs(1), mask).outputs
    assert_near(output, expected, "channels last")


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_gradient_mode(guard: type) -> None:
    """Weights that require a gradient are fine: record and edit run without autograd."""
    network = ALL["transformer block"]
    runtime, reference = fisedit.Runtime(), reference_of(network)
    module = compiled(network.module().requires_grad_(True), runtime)
    mask = RAGGED.draw(network.resolution)
    with guard():
        with runtime.record("base"):
            recorded = module(*network.inputs(0))
        with runtime.edit("base", mask=mask):
            output = module(*network.inputs(1))
    assert not recorded.requires_grad and not output.requires_grad
    (expected,) = reference.edit(reference.record(network.inputs(0)), network.inputs(1), mask).outputs
    assert_near(output.clone(), expected, guard.__name__)


def test_gradients_outside_a_context() -> None:
    """Outside record and edit the compiled network trains like the plain one."""
    network = ALL["resnet block"]
    plain, module = network.module().requires_grad_(True), network.module().requires_grad_(True)
    compiled_module = compiled(module, fisedit.Runtime())
    compiled_module(*network.inputs(0)).square().mean().backward()
    plain(*network.inputs(0)).square().mean().backward()
    for (name, parameter), (_, wanted) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert wanted.grad is not None and parameter.grad is not None, name
        assert_near(parameter.grad, wanted.grad, name)


def test_diffusers_network_by_keywords() -> None:
    """The network itself, as a pipeline calls it: keywords, and an output object."""
    network = ALL["sd15"]
    runtime, reference = fisedit.Runtime(), reference_of(network)
    inner = compiled(network.module().get_submodule("network"), runtime)

    def call(seed: int) -> Tensor:
        x, timestep, prompt = network.inputs(seed)
        with torch.no_grad():
            return inner(x, timestep, encoder_hidden_states=prompt, return_dict=True).sample

    with runtime.record("base"):
        call(0)
    mask = RAGGED.draw(network.resolution)
    with runtime.edit("base", mask=mask):
        output = call(1)
    (expected,) = reference.edit(reference.record(network.inputs(0)), network.inputs(1), mask).outputs
    assert_near(output, expected, "keywords")


def test_autocast() -> None:
    """Under autocast the graph itself holds no casts, so operators must follow the type of their rows."""
    network = ALL["transformer block"]
    runtime = fisedit.Runtime()
    module = compiled(network.module(), runtime)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = network.module()(*network.inputs(1))
        with runtime.record("base"):
            recorded = module(*network.inputs(0))
        with runtime.edit("base", mask=torch.ones(2, 2)):
            full = module(*network.inputs(1))
        with runtime.edit("base", mask=RAGGED.draw(network.resolution)):
            unchanged = module(*network.inputs(0))
    assert_near(full, dense, "full mask", dtype=torch.bfloat16)
    assert_near(unchanged, recorded, "unchanged inputs", dtype=torch.bfloat16)


def test_harness_outside_check_can_fail() -> None:
    """The check that outputs keep the recording outside the mask does see a single changed element."""
    case = compile_network(ALL["two convolutions"])
    mask = case.mask(PIXEL)
    (output,) = case.edit(case.network.inputs(1), mask)
    case.assert_outside_untouched([output], mask)
    position = (~mask).nonzero()[0]
    output[0, 0, position[0], position[1]] += 1e-6
    with pytest.raises(AssertionError, match="bit-identical"):
        Case.assert_outside_untouched(case, [output], mask)
