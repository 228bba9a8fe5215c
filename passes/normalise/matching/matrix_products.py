"""Read the operators that multiply batches of matrices alike.

``bmm``, ``matmul``, ``baddbmm`` and ``einsum`` all become a ``Product``; permutations around it are folded into the
order in which its operands are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from fisedit_compile.passes.common.ir import shape_of
from fisedit_compile.passes.common.reading.permutations import permutation
from fisedit_compile.passes.common.targets import PERMUTES, aten

PRODUCTS = {aten.bmm.default, aten.matmul.default, aten.baddbmm.default, aten.einsum.default}


class Unmatched(Exception):
    """A condition of a rule does not hold; the message is the reason for the report."""


def tensor_argument(node: fx.Node, position: int = 0) -> fx.Node:
    """The argument at ``position``.

    Raises:
        Unmatched: it is not a tensor.
    """
    value = node.args[position] if len(node.args) > position else None
    if not isinstance(value, fx.Node):
        raise Unmatched(f"argument {position} of {node.name} is not a tensor")
    return value


@dataclass(frozen=True)
class Operand:
    """A node seen with its dimensions in ``order``."""

    node: fx.Node
    order: tuple[int, ...]

    @property
    def straight(self) -> bool:
        """Whether the dimensions are in the node's own order."""
        return self.order == tuple(range(len(self.order)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in ``order``."""
        sizes = shape_of(self.node)
        return tuple(sizes[dim] for dim in self.order)

    @property
    def permuted(self) -> bool:
        """Whether the node is itself a permutation."""
        return self.node.target in PERMUTES

    def before_permutation(self) -> Operand:
        """The same values read off the input of the permutation that the node is."""
        inner = permutation(self.node, len(self.order))
        return Operand(tensor_argument(self.node), tuple(inner[dim] for dim in self.order))

    def swapped(self) -> Operand:
        """With the last two dimensions exchanged."""
        return replace(self, order=(*self.order[:-2], self.order[-1], self.order[-2]))


@dataclass(frozen=True)
class Product:
    """``left [batch..., rows, inner] @ right [batch..., columns, inner]^T``; ``order`` permutes the result
    ``[batch..., rows, columns]`` to the dimensions of the node."""

    left: Operand
    right: Operand
    order: tuple[int, ...]

    def flipped(self) -> Product:
        """The transposed product: operands exchanged, rows and columns too."""
        last = len(self.order) - 1
        exchanged = {last: last - 1, last - 1: last}
        return Product(self.right, self.left, tuple(exchanged.get(dim, dim) for dim in self.order))


def _read_einsum(node: fx.Node) -> Product:
    """Read equations like ``bhid,bhjd->bhij``."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or not arrow or "." in equation or any(len(set(term)) != len(term) for term in (*terms, result)):
        raise Unmatched(f"the einsum {equation!r} is not a plain product of two tensors")
    left, right = terms
    batch = [letter for letter in result if letter in left and letter in right]
    inner = [letter for letter in left if letter in right and letter not in result]
    rows = [letter for letter in result if letter in left and letter not in right]
    columns = [letter for letter in result if letter in right and letter not in left]
    counts = (len(inner), len(rows), len(columns))
    if counts != (1, 1, 1) or len(left) != len(batch) + 2 or len(right) != len(batch) + 2:
        raise Unmatched(f"the einsum {equation!r} is not a batched matrix product")
    first, second = operands
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    canonical = [*batch, *rows, *columns]
    return Product(
        Operand(first, tuple(left.index(letter) for letter in [*batch, *rows, *inner])),
        Operand(second, tuple(right.index(letter) for letter in [*batch, *columns, *inner])),
        tuple(canonical.index(letter) for letter in result),
    )


def read_product(node: fx.Node) -> Product:
    """Read a node whose target is one of ``PRODUCTS``; what ``baddbmm`` adds is left to the caller.

    Raises:
        Unmatched: it is no product of two tensors with the same one or two batch dimensions.
    """
    if node.target is aten.einsum.default:
        product = _read_einsum(node)
    else:
        first = 1 if node.target is aten.baddbmm.default else 0
        left, right = tensor_argument(node, first), tensor_argument(node, first + 1)
        straight = [tuple(range(len(shape_of(value)))) for value in (left, right)]
        if min(len(order) for order in straight) < 2:
            raise Unmatched("a product with a vector")
        product = Product(Operand(left, straight[0]), Operand(right, straight[1]).swapped(), straight[0])
    left_shape, right_shape = product.left.shape, product.right.shape
    if len(left_shape) != len(right_shape) or len(left_shape) not in (3, 4):
        raise Unmatched(f"a product of ranks {len(left_shape)} and {len(right_shape)}; expected both 3 or both 4")
    if left_shape[:-2] != right_shape[:-2]:
        raise Unmatched(f"the batch dimensions {left_shape[:-2]} and {right_shape[:-2]} of a product broadcast")
    return product
