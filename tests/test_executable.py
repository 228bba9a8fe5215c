"""What a compiled graph does in each phase, with a program written by hand: ``y = x * weight + time``."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fisedit_compile import executable as executable_module
from fisedit_compile.errors import (
    CallMismatchError,
    GradientError,
    GraphError,
    ScalarMismatchError,
    WeightsChangedError,
)
from fisedit_compile.executable import EditInputs, Executable, GraphIdentity
from fisedit_compile.passes import GraphInput, InputInfo, Program, Report
from fisedit_compile.prologues import prologues
from fisedit_compile.runtime import Domain, PlanInput, RecordedCall, Runtime, Site
from fisedit_compile.runtime.plans import build_plan

from tolerances import assert_identical

aten = torch.ops.aten
BATCH, CHANNELS, DOMAIN = 2, 3, Domain(4, 5)
PICTURE = (BATCH, CHANNELS, DOMAIN.height, DOMAIN.width)
ORDER = (0, 2, 3, 1)
INFOS = (InputInfo("user", "x"), InputInfo("parameter", "weight"), InputInfo("scalar", "time"))
SITES = (
    Site("scaled", "spatial", DOMAIN, ORDER, 2, PICTURE, torch.float32),
    Site("mean", "value", None, (), 0, (), torch.float32),
    Site("output:0", "spatial", DOMAIN, ORDER, 2, PICTURE, torch.float32),
)
EDIT_INPUTS = (
    GraphInput("recorded", "output:0"),
    GraphInput("plan", PlanInput("index", DOMAIN)),
    GraphInput("argument", 2),
    GraphInput("hoisted", 0),
    GraphInput("plan", PlanInput("valid", DOMAIN)),
    GraphInput("argument", 0),
)
MASK = torch.zeros(DOMAIN.height, DOMAIN.width, dtype=torch.bool)
MASK[1:3, 2:4] = True


def module_of(graph: fx.Graph) -> fx.GraphModule:
    return fx.GraphModule(torch.nn.Module(), graph)


def record_graph() -> fx.GraphModule:
    graph = fx.Graph()
    x, weight, time = (graph.placeholder(name) for name in ("x", "weight", "time"))
    x.meta["val"], weight.meta["val"], time.meta["val"] = torch.empty(PICTURE), torch.empty(3), torch.empty(())
    shaped = graph.call_function(aten.reshape.default, (weight, [1, CHANNELS, 1, 1]))
    scaled = graph.call_function(aten.mul.Tensor, (x, shaped))
    output = graph.call_function(aten.add.Tensor, (scaled, time))
    mean = graph.call_function(aten.mean.default, (x,))
    graph.output((output, scaled, mean, output))
    return module_of(graph)


def edit_graph(saving: bool, returns_recorded: bool = False) -> fx.GraphModule:
    graph = fx.Graph()
    recorded, index, time, packed, valid, x = (
        graph.placeholder(name) for name in ("recorded", "index", "time", "packed", "valid", "x")
    )
    flat = graph.call_function(aten.permute.default, (x, ORDER))
    flat = graph.call_function(aten.reshape.default, (flat, [BATCH, DOMAIN.size, CHANNELS]))
    rows = graph.call_function(torch.ops.fisedit.gather_rows.default, (flat, index))
    scaled = graph.call_function(aten.mul.Tensor, (rows, packed))
    output = graph.call_function(aten.add.Tensor, (scaled, time))
    base = graph.call_function(aten.permute.default, (recorded, ORDER))
    base = graph.call_function(aten.reshape.default, (base, [BATCH, DOMAIN.size, CHANNELS]))
    written = graph.call_function(torch.ops.fisedit.scatter_rows.default, (base, output, index, valid))
    shaped = graph.call_function(aten.reshape.default, (written, [BATCH, DOMAIN.height, DOMAIN.width, CHANNELS]))
    result = graph.call_function(aten.permute.default, (shaped, (0, 3, 1, 2)))
    if returns_recorded:
        result = graph.call_function(aten.reshape.default, (recorded, list(PICTURE)))
    graph.output((result, scaled, None, output) if saving else (result,))
    return module_of(graph)


def prologue_graph() -> fx.GraphModule:
    graph = fx.Graph()
    _, weight, _ = (graph.placeholder(name) for name in ("x", "weight", "time"))
    graph.output((graph.call_function(aten.mul.Tensor, (weight, 1.0)),))
    return module_of(graph)


def program_of(returns_recorded: bool = False) -> Program:
    return Program(
        record=record_graph(),
        edit=edit_graph(False, returns_recorded),
        edit_save=edit_graph(True, returns_recorded),
        prologue=prologue_graph(),
        edit_inputs=EDIT_INPUTS,
        sites=SITES,
        domains=(DOMAIN,),
        stencils=(),
        mask_domain=DOMAIN,
        batch=BATCH,
        report=Report(),
        parameter_positions=(1,),
        scalar_positions=(2,),
        output_count=1,
    )


def dense(x: Tensor, weight: Tensor, time: Tensor) -> tuple[Tensor]:
    return (x * weight.reshape(1, -1, 1, 1) + time,)


class Setting:
    """An executable, its runtime and its parameter."""

    def __init__(self, program: Program | None = None, identity: GraphIdentity | None = None) -> None:
        self.runtime = Runtime()
        self.program = program or program_of()
        self.identity = identity or GraphIdentity("hash", "the test graph", INFOS)
        self.executable = Executable(dense, self.program, self.runtime, self.identity)
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def __call__(self, seed: int, time: float = 1.0) -> Tensor:
        x = torch.randn(PICTURE, generator=torch.Generator().manual_seed(seed))
        (output,) = self.executable(x, self.weight, torch.tensor(time))
        return output

    def dense(self, seed: int, time: float = 1.0) -> Tensor:
        x = torch.randn(PICTURE, generator=torch.Generator().manual_seed(seed))
        return dense(x, self.weight.detach(), torch.tensor(time))[0]

    def record(self, *times: float) -> None:
        with self.runtime.record("base"):
            for time in times or (1.0,):
                self(0, time)


@pytest.fixture
def setting() -> Iterator[Setting]:
    prologues.clear()
    yield Setting()
    prologues.clear()


def mixed(inside: Tensor, outside: Tensor, mask: Tensor = MASK) -> Tensor:
    return torch.where(mask, inside, outside)


def test_outside_of_contexts_it_is_the_dense_graph_with_autograd(setting: Setting) -> None:
    output = setting(0)
    output.sum().backward()
    assert setting.weight.grad is not None
    assert_identical(output.detach(), setting.dense(0))


def test_recording_and_editing(setting: Setting) -> None:
    with setting.runtime.record("base"):
        recorded = [setting(0, time) for time in (1.0, 2.0)]
    assert not recorded[0].requires_grad
    assert_identical(recorded[1], setting.dense(0, 2.0), "recording is dense")
    with setting.runtime.edit("base", mask=MASK) as run:
        edited = [setting(5, time) for time in (1.0, 2.0)]
        assert run.density == pytest.approx(4 / 20)
    for number, time in enumerate((1.0, 2.0)):
        assert_identical(edited[number], mixed(setting.dense(5, time), recorded[number]), f"call {number}")
        assert not edited[number].requires_grad
    assert setting.runtime.stats.calls == {"record": 2, "edit": 2, "dense": 0}


def test_an_empty_mask_gives_copies_of_the_recorded_outputs(setting: Setting) -> None:
    setting.record()
    for _ in range(2):
        with setting.runtime.edit("base", mask=torch.zeros(3, 3)):
            output = setting(5)
        assert_identical(output, setting.dense(0))
        output.fill_(7.0)


def test_the_recording_does_not_share_memory_with_inputs_or_outputs(setting: Setting) -> None:
    x = torch.randn(PICTURE)
    before = dense(x, setting.weight.detach(), torch.tensor(1.0))[0].clone()
    with setting.runtime.record("base"):
        (output,) = setting.executable(x, setting.weight, torch.tensor(1.0))
        output.zero_()
        x.zero_()
    with setting.runtime.edit("base", mask=torch.zeros(3, 3)):
        assert_identical(setting(1), before)


def test_calls_are_dense_until_the_mask_is_known(setting: Setting) -> None:
    setting.record(1.0, 2.0)
    with setting.runtime.edit("base") as run:
        first = setting(5, 1.0)
        run.set_mask(MASK)
        second = setting(5, 2.0)
    assert_identical(first, setting.dense(5, 1.0))
    assert_identical(second, mixed(setting.dense(5, 2.0), setting.dense(0, 2.0)))
    assert setting.runtime.stats.calls == {"record": 2, "edit": 1, "dense": 1}


@pytest.mark.parametrize("kind", ["sparse", "empty", "dense"])
def test_a_saved_edit_is_a_base(setting: Setting, kind: str) -> None:
    setting.record()
    mask = {"sparse": MASK, "empty": torch.zeros_like(MASK), "dense": None}[kind]
    with setting.runtime.edit("base", mask=mask, save_as="next"):
        saved = setting(5)
    with setting.runtime.edit("next", mask=torch.zeros(2, 2)):
        assert_identical(setting(9), saved, "what was saved")
    with setting.runtime.edit("next", mask=~MASK):
        assert_identical(setting(9), mixed(setting.dense(9), saved, ~MASK), "an edit of the saved edit")
    with setting.runtime.edit("base", mask=torch.zeros(2, 2)):
        assert_identical(setting(9), setting.dense(0), "the first base stays")


def test_different_masks_for_the_samples_of_a_batch(setting: Setting) -> None:
    setting.record()
    masks = torch.stack([MASK, torch.zeros_like(MASK)])
    masks[1, 0, 0] = True
    with setting.runtime.edit("base", mask=masks):
        output = setting(5)
    assert_identical(output, mixed(setting.dense(5), setting.dense(0), masks[:, None]))


def test_an_output_that_is_a_recorded_tensor_is_copied() -> None:
    setting = Setting(program_of(returns_recorded=True))
    setting.record()
    for _ in range(2):
        with setting.runtime.edit("base", mask=MASK):
            output = setting(5)
        assert_identical(output, setting.dense(0))
        output.fill_(7.0)


@pytest.mark.parametrize("context", ["record", "edit"])
def test_an_input_that_requires_grad_is_refused(setting: Setting, context: str) -> None:
    setting.record()
    entered = setting.runtime.record("next") if context == "record" else setting.runtime.edit("base", mask=MASK)
    with pytest.raises(GradientError, match="input x requires grad"), entered:
        setting.executable(torch.randn(PICTURE, requires_grad=True), setting.weight, torch.tensor(1.0))
    assert setting.runtime.bases == ("base",)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the lowered graphs, as they are lowered."""
    names: list[str] = []
    lower = executable_module.Executable._lower

    def counted(self: Executable, name: str) -> Callable[..., Any]:
        names.append(name)
        return lower(self, name)

    monkeypatch.setattr(executable_module.Executable, "_lower", counted)
    return names


def test_graphs_are_lowered_when_they_are_needed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    names = counting(monkeypatch)
    setting(0)
    assert names == []
    setting.record()
    assert names == ["record"]
    for _ in range(2):
        with setting.runtime.edit("base", mask=MASK):
            setting(0)
    assert names == ["record", "prologue", "edit"]
    with setting.runtime.edit("base", mask=MASK, save_as="next"):
        setting(0)
    assert names == ["record", "prologue", "edit", "edit_save"]


def count_prologues(setting: Setting) -> list[int]:
    """Grows by one at each run of the prologue."""
    runs: list[int] = []
    lowered = setting.executable._lower("prologue")

    def counted(*arguments: Any) -> Any:
        runs.append(1)
        return lowered(*arguments)

    setting.executable._lowered["prologue"] = counted
    return runs


def test_the_prologue_runs_once_for_the_same_weights(setting: Setting) -> None:
    runs = count_prologues(setting)
    for _ in range(3):
        setting.record(1.0, 2.0)
        with setting.runtime.edit("base", mask=MASK):
            setting(5, 1.0)
            setting(5, 2.0)
    assert len(runs) == 1


@pytest.mark.parametrize("change", ["in place", "data"])
def test_changed_weights_are_an_error_and_then_packed_again(setting: Setting, change: str) -> None:
    runs = count_prologues(setting)
    setting.record()
    with setting.runtime.edit("base", mask=MASK):
        setting(5)
    if change == "in place":
        with torch.no_grad():
            setting.weight.mul_(2)
    else:
        setting.weight.data += 1
    with pytest.raises(WeightsChangedError), setting.runtime.edit("base", mask=MASK):
        setting(5)
    setting.record()
    with setting.runtime.edit("base", mask=MASK):
        output = setting(5)
    assert_identical(output, mixed(setting.dense(5), setting.dense(0)))
    assert len(runs) == 2


def test_hoisted_tensors_die_with_the_parameters(setting: Setting) -> None:
    setting.record()
    with setting.runtime.edit("base", mask=MASK):
        setting(5)
    assert len(prologues) == 1
    setting.weight = torch.nn.Parameter(torch.ones(CHANNELS))
    gc.collect()
    assert len(prologues) == 0


def test_one_graph_serves_two_networks(setting: Setting) -> None:
    """Instances of one class share the compiled graph: what is kept belongs to the parameters."""
    first, second = setting.weight, torch.nn.Parameter(torch.tensor([5.0, 6.0, 7.0]))
    with setting.runtime.record("base"):
        setting(0)
        setting.weight = second
        setting(0)
    with setting.runtime.edit("base", mask=MASK):
        output = setting(5)
        assert_identical(output, mixed(setting.dense(5), setting.dense(0)), "second network first")
        setting.weight = first
        output = setting(5)
        assert_identical(output, mixed(setting.dense(5), setting.dense(0)), "first network")


def test_a_graph_without_spatial_inputs_runs_densely_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    program = program_of()
    program.edit = program.edit_save = None
    program.batch = program.mask_domain = None
    identity = GraphIdentity("hash", "the test graph", INFOS, dense_reason="nothing is spatial")
    setting = Setting(program, identity)
    setting.record()
    with caplog.at_level(logging.WARNING):
        with setting.runtime.edit("base", mask=MASK, save_as="next"):
            assert_identical(setting(5), setting.dense(5))
    with setting.runtime.edit("next", mask=MASK):
        assert_identical(setting(5), setting.dense(5))
    assert setting.runtime.stats.calls == {"record": 1, "edit": 0, "dense": 2}


def test_a_graph_that_was_not_traced_runs_densely_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    setting = Setting()
    identity = GraphIdentity("hash", "the test graph", INFOS, dense_reason="dropout is random")
    setting.executable = Executable(dense, None, setting.runtime, identity)
    with caplog.at_level(logging.WARNING, "fisedit_compile"):
        setting.record(1.0, 2.0)
    assert [record.getMessage() for record in caplog.records] == ["the test graph runs densely: dropout is random"]
    with setting.runtime.edit("base", mask=MASK, save_as="next"):
        assert_identical(setting(5, 1.0), setting.dense(5, 1.0))
        setting(5, 2.0)
    with pytest.raises(CallMismatchError), setting.runtime.edit("next", mask=MASK):
        setting(5, 1.0)


def numbered(*numbers: int, constants: frozenset[int] = frozenset()) -> Setting:
    return Setting(identity=GraphIdentity("hash", "the test graph", INFOS, numbers, constants))


def test_a_python_number_that_changes_is_refused() -> None:
    setting = numbered(2)
    with pytest.raises(ScalarMismatchError, match=r"number time changed from 1.0 to 2.0 .*torch.tensor"):
        setting.record(1.0, 1.0, 2.0)
    assert setting.runtime.bases == ()


def test_a_python_number_that_differs_in_the_edit_is_explained() -> None:
    setting = numbered(2)
    setting.record(3.0)
    with pytest.raises(ScalarMismatchError) as caught, setting.runtime.edit("base", mask=MASK):
        setting(5, 4.0)
    assert "time came as a Python number" in "".join(caught.value.__notes__)


def test_a_python_number_that_stays_is_fine() -> None:
    setting = numbered(2)
    setting.record(3.0, 3.0)
    with setting.runtime.edit("base", mask=MASK):
        setting(5, 3.0)
        setting(5, 3.0)


def test_inputs_fixed_by_tracing_are_not_compared() -> None:
    setting = numbered(constants=frozenset({2}))
    setting.record(3.0)
    with setting.runtime.edit("base", mask=MASK):
        setting(5, 4.0)


def test_scalars_are_compared(setting: Setting) -> None:
    setting.record(3.0)
    with pytest.raises(ScalarMismatchError), setting.runtime.edit("base", mask=MASK):
        setting(5, 4.0)


def test_edit_inputs_are_in_the_order_of_the_program(setting: Setting) -> None:
    inputs = EditInputs(setting.program, 3)
    setting.record()
    seen: list[tuple[Any, ...]] = []
    setting.executable._lowered["edit"] = lambda *values: seen.append(values) or (torch.zeros(PICTURE),)
    with setting.runtime.edit("base", mask=MASK):
        setting(5)
    recorded, index, time, packed, valid, x = seen[0]
    assert_identical(recorded, setting.dense(0))
    assert index.tolist() == [[7, 8, 12, 13]]
    assert (time.item(), packed.tolist(), valid, tuple(x.shape)) == (1.0, [1.0, 2.0, 3.0], None, PICTURE)
    assert isinstance(inputs, EditInputs)


def test_valid_can_be_supplied_where_no_row_is_padding(setting: Setting) -> None:
    plan = build_plan(MASK[None], (DOMAIN,), (), torch.device("cpu"))
    call = RecordedCall({"output:0": torch.zeros(PICTURE)}, ())
    for every_valid in (False, True):
        inputs = EditInputs(setting.program, 3, every_valid)
        values = inputs.assemble((1, 2, 3), (torch.zeros(3),), plan, call)
        assert (values[4] is None) is not every_valid
    assert values[4].all() and values[4].shape == values[1].shape
    assert (values[2], values[5]) == (3, 1)


def test_a_program_that_reads_unknown_things_is_an_error() -> None:
    program = program_of()
    program.edit_inputs = (GraphInput("nowhere", 1),)
    with pytest.raises(GraphError, match="nowhere"):
        EditInputs(program, 3)
    program.edit_inputs = (GraphInput("argument", 3),)
    with pytest.raises(GraphError, match="arguments"):
        EditInputs(program, 3)
