"""Let the Python code that FX writes for a graph compute what the graph says.

Why: FX writes some calls as Python's own operators, with the numbers among their arguments as text. That text may be
read otherwise: ``pow(-1, t)`` becomes ``-1 ** t``, which Python takes for ``-(1 ** t)``; of the complex number
``(-1-0j)`` the sign of the zero is lost, and ``infj`` is no number at all; ``iadd(n, 1)`` becomes ``n += 1``, which
changes what later readers of ``n`` see. Whoever interprets the graph gets other values than whoever runs its code.

Before: ``p = operator.pow(-1, t)``, ``q = torch.mul(x, -2j)``
After:  ``p = pow(-1, t)`` of this file, ``c = complex(-0.0, -2.0)``, ``q = torch.mul(x, c)``

Conditions, for the graph and for those that it holds (branches, bodies), but not for modules that it calls:
1. A power of a number, a call that changes its first operand in place where that is not known to be a tensor, and a
   method or an attribute of a number are calls of functions.
2. A complex number among the arguments of a call is made from its two parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fisedit_compile.passes.common.meta import EXAMPLE_VALUE, VALUE

#: Operators of Python that change their first operand, where that can be changed.
IN_PLACE = (
    operator.iadd, operator.iand, operator.ifloordiv, operator.ilshift, operator.imod, operator.imul, operator.imatmul,
    operator.ior, operator.ipow, operator.irshift, operator.isub, operator.itruediv, operator.ixor,
)  # fmt: skip


def _function(target: Callable[..., Any]) -> Callable[..., Any]:
    """The same function under a name that FX writes as a call."""

    def run(*args: Any) -> Any:
        return target(*args)

    run.__name__ = run.__qualname__ = target.__name__
    run.__module__ = __name__
    return run


#: What stands for an operator in a graph whose code is run.
FUNCTIONS = {target: _function(target) for target in (operator.pow, *IN_PLACE)}


def method(value: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a value."""
    return getattr(value, name)(*args, **kwargs)


def attribute(value: Any, name: str) -> Any:
    """Read an attribute of a value."""
    return getattr(value, name)


def _rewrite_call(node: fx.Node) -> bool:
    """Condition 1; whether the node was changed."""
    first = node.args[0] if node.args else None
    if node.op == "call_method" and not isinstance(first, fx.Node):
        node.args = (first, node.target, *node.args[1:])  # type: ignore[arg-type]
        node.op, node.target = "call_function", method
    elif node.target is getattr and not isinstance(first, fx.Node) and len(node.args) == 2:
        node.target = attribute
    elif node.target is operator.pow and not isinstance(first, fx.Node):
        node.target = FUNCTIONS[operator.pow]
    elif node.target in IN_PLACE and not _is_tensor(first):
        node.target = FUNCTIONS[node.target]
    else:
        return False
    return True


def _is_tensor(value: object) -> bool:
    """Whether a value is known to be a tensor. Dynamo calls what it saw ``example_value``, tracing ``val``."""
    if not isinstance(value, fx.Node):
        return False
    return isinstance(value.meta.get(EXAMPLE_VALUE, value.meta.get(VALUE)), torch.Tensor)


def _rewrite_numbers(node: fx.Node) -> bool:
    """Condition 2; whether the node was changed."""
    made = []

    def spelled(value: Any) -> Any:
        if type(value) is not complex:
            return value
        with node.graph.inserting_before(node):
            number = node.graph.call_function(complex, (value.real, value.imag))
        made.append(number)
        return number

    arguments = fx.node.map_aggregate((node.args, node.kwargs), spelled)
    if made:
        node.args, node.kwargs = arguments
    return bool(made)


def spell_literals(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Run the pass in place, make the code of what it changed anew, and return the module."""
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr":
            held = getattr(graph_module, str(node.target), None)
            if isinstance(held, fx.GraphModule):
                spell_literals(held)
        elif node.op in ("call_function", "call_method"):
            # What makes a complex number has none among its arguments.
            changed |= _rewrite_call(node) | _rewrite_numbers(node)
    if changed:
        graph_module.recompile()
    return graph_module
