"""A program written by hand, ``y = x * weight + time``, and an executable around it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fisedit_compile.executing.compiled_graph import CompiledGraph
from fisedit_compile.executing.executable import Executable
from fisedit_compile.passes import GraphInput, InputInfo, Program, Report, SparseProgram
from fisedit_compile.runtime import Domain, PlanInput, Runtime, Site
from fisedit_compile.tracing.identity import GraphIdentity

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


def program_of(returns_recorded: bool = False) -> SparseProgram:
    return SparseProgram(
        record=record_graph(),
        edit=edit_graph(False, returns_recorded),
        edit_save=edit_graph(True, returns_recorded),
        prologue=prologue_graph(),
        invariants=None,
        invariant_inputs=(),
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
    """A compiled graph, its executable, its runtime and its parameter."""

    def __init__(self, program: Program | None = None, identity: GraphIdentity | None = None) -> None:
        self.runtime = Runtime()
        self.program = program or program_of()
        self.identity = identity or GraphIdentity("hash", "the test graph", INFOS)
        self.executable = Executable(dense, self.program, self.runtime, self.identity)
        self.graph = CompiledGraph(dense, self.runtime, lambda: self.executable)
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def __call__(self, seed: int, time: float = 1.0) -> Tensor:
        x = torch.randn(PICTURE, generator=torch.Generator().manual_seed(seed))
        (output,) = self.graph(x, self.weight, torch.tensor(time))
        return output

    def dense(self, seed: int, time: float = 1.0) -> Tensor:
        x = torch.randn(PICTURE, generator=torch.Generator().manual_seed(seed))
        return dense(x, self.weight.detach(), torch.tensor(time))[0]

    def record(self, *times: float) -> None:
        with self.runtime.record("base"):
            for time in times or (1.0,):
                self(0, time)


def mixed(inside: Tensor, outside: Tensor, mask: Tensor = MASK) -> Tensor:
    return torch.where(mask, inside, outside)
