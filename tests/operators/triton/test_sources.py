"""Generated source: what it looks like, where it lies, and how chains of operators become code."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch
from torch import fx

from fisedit_compile.operators.convolution.triton_template import conv_source
from fisedit_compile.operators.triton import fusion, sources
from fisedit_compile.operators.triton.pointwise import (
    CURRENT,
    Chain,
    Operand,
    Step,
    add_bias,
    operand_kind,
    operator_name,
    print_function,
)

aten, fisedit = torch.ops.aten, torch.ops.fisedit
GOLDEN = Path(__file__).parent / "golden"
NOTHING = Chain()
RESIDUAL = Chain((Step("add", (Operand(0), CURRENT)), Step("div", (CURRENT, 1.4142))), ("rows",))
NORM = Chain((Step("mul", (CURRENT, Operand(0))), Step("add", (CURRENT, Operand(1))), Step("silu")), ("sample",) * 2)
SOURCES = {
    "conv_plain": (NOTHING, NOTHING),
    "conv_bias_time_silu": (
        NOTHING,
        add_bias(Chain((Step("add", (CURRENT, Operand(0))), Step("silu")), ("sample",))),
    ),
    "conv_normed_residual": (NORM, add_bias(RESIDUAL)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_as_recorded(name: str) -> None:
    """FISEDIT_UPDATE_GOLDEN=1 records it; read what changed before committing it."""
    path, text = GOLDEN / f"{name}.py", conv_source(*SOURCES[name])
    if os.environ.get("FISEDIT_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_readable(name: str) -> None:
    text = conv_source(*SOURCES[name])
    assert "@@" not in text and max(map(len, text.splitlines())) <= 120
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert {"conv_rows", "add_splits"} <= {function.name for function in functions}
    lines = text.splitlines()
    for function in functions:
        for argument in function.args.args:
            assert "#" in lines[argument.lineno - 1], f"{function.name}: {argument.arg} has no comment"


def test_files_are_named_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FISEDIT_DUMP_DIR", str(tmp_path / "dump"))
    monkeypatch.setattr(sources, "_loaded", {})
    first = sources.load_source("test", "VALUE = 1\n")
    assert sources.load_source("test", "VALUE = 1\n") is first and first.VALUE == 1
    assert sources.load_source("test", "VALUE = 2\n").VALUE == 2
    files = sorted((tmp_path / "cache" / "kernels").glob("*"))
    assert len(files) == 2 and Path(first.__file__) in files
    assert sorted(path.name for path in (tmp_path / "dump" / "kernels").iterdir()) == [path.name for path in files]


def test_a_damaged_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sources, "_loaded", {})
    path = Path(sources.load_source("test", "VALUE = 1\n").__file__)
    path.write_text("VALUE = 3\n")
    sources._loaded.clear()
    assert sources.load_source("test", "VALUE = 1\n").VALUE == 1
    assert path.read_text() == "VALUE = 1\n"


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FISEDIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert sources.cache_folder() == Path("/somewhere/fisedit-compile")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_folder() == Path.home() / ".cache" / "fisedit-compile"


def test_chains_are_checked_and_described() -> None:
    assert str(RESIDUAL) == "add(rows 0) -> div(1.4142)" and str(NOTHING) == "nothing"
    assert str(add_bias(RESIDUAL)) == "add(channel 0) -> add(rows 1) -> div(1.4142)"
    for chain, message in (
        (Chain((Step("pow"),)), "unknown operator 'pow'"),
        (Chain((), ("column",)), "unknown kind of operand 'column'"),
        (Chain((Step("add", (CURRENT, Operand(0))),)), "reads operand 0 of 0"),
        (Chain((Step("mul", (CURRENT, float("inf"))),)), "has the number inf"),
    ):
        with pytest.raises(ValueError, match=message):
            print_function(chain, "change", "operand")


def test_operators_with_other_arguments_have_no_formula() -> None:
    assert operator_name(aten.add.Tensor, {}) == operator_name(aten.add.Tensor, {"alpha": 1}) == "add"
    assert operator_name(aten.add.Tensor, {"alpha": 2}) is None
    assert operator_name(aten.gelu.default, {}) == "gelu"
    assert operator_name(aten.gelu.default, {"approximate": "tanh"}) == "gelu_tanh"
    assert operator_name(aten.div.Tensor, {"rounding_mode": "floor"}) is None
    assert operator_name(aten.pow.Tensor_Scalar, {}) is None


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((8,), "channel"), ((1, 8), "channel"), ((1, 1, 8), "sample"), ((2, 1, 8), "sample"), ((2, 5, 8), "rows")]
    + [((5, 8), None), ((2, 5, 1), None), ((), None), ((1, 5, 8), None), ((3, 1, 8), None), ((1, 2, 5, 8), None)],
)
def test_kinds_of_operands(shape: tuple[int, ...], kind: str | None) -> None:
    assert operand_kind(torch.empty(shape), 2, 5, 8) == kind


def conv_graph(build) -> fx.GraphModule:
    """A graph of a convolution with seven inputs, a second operand, and what ``build`` makes of both."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"input_{number}") for number in range(8)]
    node = graph.call_function(fisedit.conv_rows.default, (*inputs[:6], 1))
    graph.output(build(graph, node, inputs[7]))
    return fusion.fuse(fx.GraphModule({}, graph))


def targets(module: fx.GraphModule) -> list[str]:
    return [node.target.__name__ for node in module.graph.nodes if node.op == "call_function"]


def test_what_follows_a_convolution_is_fused(kernels_run: None) -> None:
    def build(graph: fx.Graph, node: fx.Node, other: fx.Node) -> fx.Node:
        added = graph.call_function(aten.add.Tensor, (other, node))
        return graph.call_function(aten.silu.default, (graph.call_function(aten.div.Tensor, (added, 2.0)),))

    module = conv_graph(build)
    assert targets(module) == ["conv_rows_and_more"]
    (fused,) = (node for node in module.graph.nodes if node.op == "call_function")
    assert [str(argument) for argument in fused.args] == [*(f"input_{number}" for number in range(6)), "1", "input_7"]


def test_fusing_stops_where_a_result_is_used_twice_or_no_formula_is_known(kernels_run: None) -> None:
    def twice(graph: fx.Graph, node: fx.Node, other: fx.Node) -> tuple[fx.Node, fx.Node]:
        return graph.call_function(aten.silu.default, (node,)), node

    def unknown(graph: fx.Graph, node: fx.Node, other: fx.Node) -> fx.Node:
        return graph.call_function(aten.add.Tensor, (node, other), {"alpha": 2})

    def partly(graph: fx.Graph, node: fx.Node, other: fx.Node) -> fx.Node:
        active = graph.call_function(aten.silu.default, (node,))
        return graph.call_function(aten.sub.Tensor, (active, float("inf")))

    assert targets(conv_graph(twice)) == ["conv_rows.default", "silu.default"]
    assert targets(conv_graph(unknown)) == ["conv_rows.default", "add.Tensor"]
    assert targets(conv_graph(partly)) == ["conv_rows_and_more", "sub.Tensor"]


def test_nothing_is_fused_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion.devices, "triton_usable", lambda: False)
    module = conv_graph(lambda graph, node, other: graph.call_function(aten.silu.default, (node,)))
    assert targets(module) == ["conv_rows.default", "silu.default"]
