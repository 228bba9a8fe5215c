"""Check what every lifted graph must satisfy, so that a defect of a pass is an error and never a wrong picture.

Conditions:
1. No marker node is left.
2. The record graph returns the original outputs followed by one tensor for each site; the dense graph, which takes the
   same inputs, the original outputs only.
3. The edit graphs have one placeholder for each edit input; edit_save returns one update for each site.
4. Every recorded input names a site.
5. Site names are unique.
6. The graphs pass ``graph.lint()``, which is too slow to run behind every pass: tests of passes do that.
"""

from __future__ import annotations

from torch import fx

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import MARKERS
from fisedit_compile.passes.common.program import Program, SparseProgram


def _check(condition: bool, text: str) -> None:
    if not condition:
        raise GraphError(text)


def _returned(graph_module: fx.GraphModule) -> int:
    output = next(iter(reversed(graph_module.graph.nodes)))
    return len(output.args[0])


def _placeholders(graph_module: fx.GraphModule) -> int:
    return sum(node.op == "placeholder" for node in graph_module.graph.nodes)


def _lint(graph_module: fx.GraphModule) -> None:
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise GraphError(f"a lifted graph is broken: {error}") from error


def verify(compilation: Compilation) -> None:
    """Run the pass on the finished program.

    Raises:
        GraphError: there is no program, or a condition is violated; the text says which.
    """
    if compilation.program is None:
        raise GraphError("there is no program to verify; make_program has to run first")
    check_program(compilation.program)


def check_program(program: Program) -> None:
    """Raise a ``GraphError`` that says which condition a program violates, if any."""
    names = [site.name for site in program.sites]
    _check(len(set(names)) == len(names), "two cache sites share a name")
    _check(_returned(program.record) == program.output_count + len(names), "the record graph misses a store")
    for graph_module in program.graphs().values():
        left = [node.name for node in graph_module.graph.nodes if node.target in MARKERS]
        _check(not left, f"marker nodes are left: {', '.join(left)}")
        _lint(graph_module)
    if isinstance(program, SparseProgram):
        _check_sparse(program, names)


def _check_sparse(program: SparseProgram, names: list[str]) -> None:
    if program.dense is not None:
        _check(_returned(program.dense) == program.output_count, "the dense graph misses an output")
        _check(_placeholders(program.dense) == _placeholders(program.record), "the dense graph takes other inputs")
    made = 0 if program.prologue is None else _returned(program.prologue)
    _check(all(number < made for number in program.dense_inputs), "the record graph reads what is not hoisted")
    for graph_module in (program.edit, program.edit_save):
        count = _placeholders(graph_module)
        _check(count == len(program.edit_inputs), f"{count} placeholders for {len(program.edit_inputs)} edit inputs")
    _check(_returned(program.edit) == program.output_count, "the edit graph misses an output")
    _check(_returned(program.edit_save) == program.output_count + len(names), "the saving edit graph misses an update")
    recorded = {source.reference for source in program.edit_inputs if source.kind == "recorded"}
    _check(recorded <= set(names), f"inputs read unknown sites: {sorted(map(str, recorded - set(names)))}")
