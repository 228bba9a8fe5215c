"""The backend: registration, options, what identifies a graph, graphs that stay dense, strictness of Dynamo."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fisedit_compile as fisedit
from fisedit_compile import backend
from fisedit_compile.errors import CallMismatchError, OptionError
from fisedit_compile.executing.compiled_graph import CompiledGraph
from fisedit_compile.executing.executable import Executable
from fisedit_compile.tracing import identity
from fisedit_compile.tracing.description import describe
from fisedit_compile.tracing.trace import trace
from support.shape_networks import BLOCKS
from support.tolerances import assert_identical

NETWORKS = {network.name: network for network in BLOCKS}
MASK = torch.zeros(13, 9)
MASK[3:6, 2:5] = 1


class Small(nn.Module):
    """A convolution, and whatever a test wants behind it."""

    def __init__(self, function: Callable[..., Any] = torch.relu) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor, *arguments: Any) -> Any:
        return self.function(self.convolution(x), *arguments)


class Keeping:
    """The backend, keeping what it returns."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.found: list[CompiledGraph] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledGraph:
        self.found.append(backend.fisedit(gm, example_inputs, options=self.options))
        return self.found[-1]


def executable_of(module: nn.Module, *inputs: Any, **options: Any) -> Executable:
    """What one call of the module is compiled to."""
    keeping = Keeping(**options)
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(module, backend=keeping)(*inputs)
    (found,) = keeping.found
    return found.executable


def hash_of(module: nn.Module, *inputs: Any, **options: Any) -> str:
    return executable_of(module, *inputs, **options).identity.graph_hash


def picture(width: int = 9) -> Tensor:
    return torch.randn(2, 3, 13, width, generator=torch.Generator().manual_seed(0))


def test_pytorch_finds_the_backend() -> None:
    assert "fisedit" in torch.compiler.list_backends()


def test_outside_of_contexts_outputs_and_gradients_are_those_of_eager() -> None:
    network = NETWORKS["transformer block"]
    eager, compiled = network.module().requires_grad_(True), network.module().requires_grad_(True)
    inputs = network.inputs(0)
    expected = eager(*inputs)
    output = torch.compile(compiled, backend="fisedit")(*inputs)
    assert_identical(output, expected, "dense")
    expected.square().sum().backward()
    output.square().sum().backward()
    for wanted, got in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert wanted.grad is not None and got.grad is not None
        assert_identical(got.grad, wanted.grad, "gradient")


def test_wrong_options_leave_a_context_as_themselves() -> None:
    runtime = fisedit.Runtime()
    module = torch.compile(Small(), backend="fisedit", options={"runtime": runtime, "norm": "wrong"})
    with pytest.raises(OptionError, match="exact, cached"), runtime.record("base"), torch.no_grad():
        module(picture())


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_on_a_processor_no_mode_asks_for_the_slower_lowering(mode: str | None) -> None:
    seen: list[CompiledGraph] = []

    def keeping(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> CompiledGraph:
        seen.append(backend.fisedit(gm, example_inputs, **settings))
        return seen[-1]

    with torch.no_grad():
        torch.compile(Small(), backend=keeping, mode=mode)(picture())
    assert seen[0].executable._lowering == "plain"


def test_without_a_runtime_it_is_the_default_one() -> None:
    assert executable_of(Small(), picture())._runtime is fisedit.default_runtime()


def test_the_hash_is_the_same_for_the_same_structure() -> None:
    first = hash_of(Small(), picture())
    assert hash_of(Small(), picture()) == first, "another instance"
    with torch.inference_mode():
        assert hash_of(Small(), picture()) == first
    assert hash_of(Small(), picture(), runtime=fisedit.Runtime(), lowering="inductor") == first


def test_the_hash_is_the_same_when_dynamo_made_the_size_dynamic() -> None:
    first = hash_of(Small(), picture(7))
    keeping = Keeping()
    torch.compiler.reset()
    compiled = torch.compile(Small(), backend=keeping)
    with torch.no_grad():
        compiled(picture(9))
        compiled(picture(7))
    assert len(keeping.found[1].executable.identity.constants) > 0, "the size came as an input"
    assert [found.executable.identity.graph_hash == first for found in keeping.found] == [False, True]
    assert keeping.found[1].executable.program is not None
    names = [site.name for site in keeping.found[1].executable.program.sites]
    assert names == [site.name for site in executable_of(Small(), picture(7)).program.sites]


@pytest.mark.parametrize(
    "other",
    [
        lambda: hash_of(Small(), picture(8)),
        lambda: hash_of(Small(functional.gelu), picture()),
        lambda: hash_of(Small(lambda x: x + torch.tensor(2.0)), picture()),
        lambda: hash_of(Small().double(), picture().double()),
        lambda: hash_of(Small(lambda x: x + torch.tensor(1.0)), picture(), norm="cached"),
        lambda: hash_of(Small(lambda x: x + torch.tensor(1.0)), picture(), disable_passes="sparsify_pointwise"),
    ],
)
def test_the_hash_tells_graphs_apart(other: Callable[[], str]) -> None:
    assert other() != hash_of(Small(lambda x: x + torch.tensor(1.0)), picture())


def test_the_hash_tells_autocast_apart() -> None:
    plain = executable_of(Small(), picture())
    with torch.autocast("cpu", torch.bfloat16):
        cast = executable_of(Small(), picture())
    assert cast.identity.graph_hash != plain.identity.graph_hash
    assert "autocast cpu bfloat16" in cast.identity.label and "autocast" not in plain.identity.label


def test_the_hash_does_not_depend_on_memory_addresses() -> None:
    """Functions print with their address; those of an untraced graph are Python functions."""
    gm = fx.symbolic_trace(lambda x: functional.dropout(x, 0.5))
    text = identity.target_name(functional.dropout)
    assert text == "torch.nn.functional.dropout"
    assert any(node.target is functional.dropout for node in gm.graph.nodes)


def test_autocast_around_record_and_edit() -> None:
    runtime = fisedit.Runtime()
    module = Small()
    compiled = torch.compile(module, backend="fisedit", options={"runtime": runtime})
    x, changed = picture(), picture() + 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with runtime.record("base"):
            recorded = compiled(x)
        with runtime.edit("base", mask=torch.ones(13, 9)):
            edited = compiled(changed)
        assert recorded.dtype == edited.dtype == torch.bfloat16
        torch.testing.assert_close(edited.float(), module(changed).float(), atol=0.05, rtol=0.02)
    with pytest.raises(CallMismatchError, match="autocast"), runtime.edit("base", mask=MASK), torch.no_grad():
        compiled(x)


def test_a_graph_that_stays_dense_is_recorded_edited_and_named(caplog: pytest.LogCaptureFixture) -> None:
    runtime = fisedit.Runtime()
    module = Small(lambda x: functional.dropout(x, 0.5, training=True))
    compiled = torch.compile(module, backend="fisedit", options={"runtime": runtime})
    with caplog.at_level(logging.WARNING, "fisedit_compile"), torch.no_grad():
        with runtime.record("base"):
            compiled(picture())
        with runtime.edit("base", mask=MASK):
            compiled(picture())
    (record,) = caplog.records
    assert "masked at its outputs: aten.dropout.default is random" in record.getMessage()
    assert runtime.stats.calls == {"record": 1, "edit": 1, "dense": 0}


def test_training_is_left_alone() -> None:
    """Batch statistics are updated by the dense graph, outside and inside of contexts."""
    runtime = fisedit.Runtime()
    module, plain = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train() for _ in range(2))
    plain.load_state_dict(module.state_dict())
    compiled = torch.compile(module, backend="fisedit", options={"runtime": runtime})
    with torch.no_grad(), runtime.record("base"):
        output = compiled(picture())
        assert_identical(output, plain(picture()))
    assert_identical(module.get_buffer("1.running_mean"), plain.get_buffer("1.running_mean"))


def test_two_instances_of_one_class() -> None:
    runtime = fisedit.Runtime()
    modules = [Small(), Small()]
    compiled = [torch.compile(module, backend="fisedit", options={"runtime": runtime}) for module in modules]
    x = picture()
    with torch.no_grad():
        with runtime.record("base"):
            recorded = [call(x) for call in compiled]
        with runtime.edit("base", mask=torch.zeros(4, 4)):
            assert_identical(compiled[1](x + 1), recorded[1])
            assert_identical(compiled[0](x + 1), recorded[0])
    assert not torch.equal(recorded[0], recorded[1])


def test_an_unchanged_graph_is_not_compiled_again() -> None:
    """What was traced keeps working for other weights, masks and contexts."""
    keeping = Keeping(runtime=fisedit.Runtime())
    compiled = torch.compile(Small(), backend=keeping)
    runtime = keeping.options["runtime"]
    with torch.no_grad():
        for _ in range(3):
            with runtime.record("base"):
                compiled(picture())
            with runtime.edit("base", mask=MASK):
                compiled(picture())
    assert len(keeping.found) == 1


def test_constants_count_in_the_hash() -> None:
    graphs = []
    for value in (1.0, 2.0):
        torch.compiler.reset()

        def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
            graphs.append(trace(gm, describe(gm, example_inputs)))
            return gm

        torch.compile(lambda x, value=value: x + torch.tensor([value, 0.0]), backend=keep)(torch.randn(3, 2))
    first, second = graphs
    assert identity.structural_hash(first.gm, first.input_infos) != identity.structural_hash(
        second.gm, second.input_infos
    )
    assert identity.structural_hash(first.gm, first.input_infos, "a") != identity.structural_hash(
        first.gm, first.input_infos, "b"
    )


class Counting:
    """``backend.trace``, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(backend, "trace", self)

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return trace(*arguments)


def test_a_program_is_made_by_the_first_call_inside_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Counting(monkeypatch)
    runtime = fisedit.Runtime()
    compiled = torch.compile(Small(), backend="fisedit", options={"runtime": runtime})
    with torch.no_grad():
        compiled(picture())
        assert traced.count == 0
        with runtime.record("base"):
            compiled(picture())
        assert traced.count == 1
        with runtime.edit("base", mask=MASK):
            compiled(picture())
        compiled(picture())
    assert traced.count == 1


def test_threads_that_record_first_together() -> None:
    """While one traces, the others are inside compiled networks."""
    runtime = fisedit.Runtime()
    compiled = torch.compile(Small(), backend="fisedit", options={"runtime": runtime})
    with torch.no_grad():
        expected = compiled(picture())
    barrier = threading.Barrier(3)

    def record(number: int) -> Tensor:
        barrier.wait()
        with runtime.record(f"base {number}"), torch.no_grad():
            output: Tensor = compiled(picture())
            return output

    with ThreadPoolExecutor(3) as pool:
        for output in pool.map(record, range(3)):
            assert_identical(output, expected)


def test_threads_make_one_program_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Counting(monkeypatch)
    keeping = Keeping()
    with torch.no_grad():
        torch.compile(Small(), backend=keeping)(picture())
    (graph,) = keeping.found
    barrier = threading.Barrier(3)

    def first(number: int) -> Executable:
        barrier.wait()
        return graph.executable

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(first, range(3)))) == 1
    assert traced.count == 1


def test_numbers_that_may_have_to_be_fixed_are_traced_while_dynamo_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the graph would be used for other numbers than the one that it branched on."""
    traced = Counting(monkeypatch)
    module = Small(lambda x, number: x * number if number > 3 else x - number)
    compiled = torch.compile(module, backend="fisedit", options={"runtime": fisedit.Runtime()}, dynamic=True)
    with torch.no_grad():
        for number in (5, 7, 2):
            assert_identical(compiled(picture(), number), module(picture(), number))
    assert traced.count > 0


def test_a_default_device_around_the_first_recording() -> None:
    """It is a mode, which must not reach what tracing creates."""
    runtime = fisedit.Runtime()
    module = Small(lambda x: x + torch.arange(9))
    compiled = torch.compile(module, backend="fisedit", options={"runtime": runtime})
    with torch.no_grad(), torch.device("cpu"):
        compiled(picture())
        with runtime.record("base"):
            recorded = compiled(picture())
        with runtime.edit("base", mask=torch.ones(13, 9)):
            edited = compiled(picture() + 1)
        assert_identical(recorded, module(picture()))
        torch.testing.assert_close(edited, module(picture() + 1))


def test_compiling_keeps_no_inputs_alive() -> None:
    compiled = torch.compile(Small(), backend="fisedit", options={"runtime": fisedit.Runtime()})
    x = picture()
    alive = weakref.ref(x)
    with torch.no_grad():
        compiled(x)
    del x
    assert alive() is None


def test_ways_of_convolutions_are_counted() -> None:
    runtime = fisedit.Runtime()
    module = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    compiled = torch.compile(module, backend="fisedit", options={"runtime": runtime})
    x = torch.randn(1, 64, 32, 32)
    with torch.no_grad():
        with runtime.record("base"):
            compiled(x)
            compiled(x)
        assert sum(runtime.stats.ways.values()) == 4
        assert set(runtime.stats.ways) <= {"convolution of a map: direct", "convolution of a map: tiles"}
        runtime.reset_stats()
        with runtime.edit("base") as run:
            compiled(x)
            assert sum(runtime.stats.ways.values()) == 2, "dense calls before the mask is known"
            runtime.reset_stats()
            run.set_mask(torch.ones(32, 32).triu())
            compiled(x)
        with runtime.edit("base", mask=torch.ones(32, 32).triu()):
            compiled(x)
            compiled(x)
    assert sum(runtime.stats.ways.values()) == 6
    ways = ("rows", "tiles", "compiled tiles", "dense")
    assert set(runtime.stats.ways) <= {f"convolution: {way}" for way in ways}
    assert "ways: convolution: " in repr(runtime.stats)
    runtime.reset_stats()
    assert runtime.stats.ways == {} and "ways: none to choose from" in repr(runtime.stats)
