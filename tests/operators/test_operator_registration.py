"""Every operator keeps the rules of torch.library: schema, fake kernel with strides, tracing with symbolic sizes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from fisedit_compile import operators as ops
from fisedit_compile.operators import choosing
from fisedit_compile.operators.library import OPERATORS, infer_schema

INDEX = torch.tensor([[1, 4, 2]])
INDICES = torch.tensor([[1, 4, 2], [0, 3, 5]])
VALID = torch.tensor([[True, True, False], [True, True, True]])
TABLE = torch.tensor([[[0, 3, 5, 2], [1, 4, 2, 0]]])
TABLES = torch.cat([TABLE, TABLE.flip(2)])
HALO = torch.tensor([[0, 3]])
TABLE9 = torch.randint(0, 6, (1, 3, 9))
PATCHES = torch.randint(0, 6, (1, 2, 16))
PLACE = torch.tensor([[[0], [1], [1]]])
KERNEL = torch.randn(6, 4, 3, 3)
TILE_WEIGHTS = [torch.randn(6, 4) for _ in range(16)]


def channels_first(*shape: int) -> torch.Tensor:
    return torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


SAMPLES = {
    "gather_rows": [
        (torch.randn(2, 6, 5), INDEX),
        (channels_first(2, 6, 5), INDICES),
        (torch.randn(2, 6, 3, 2)[..., :1], INDICES),
    ],
    "scatter_rows": [
        (torch.randn(2, 6, 5), torch.randn(2, 3, 5), INDEX, None),
        (channels_first(2, 6, 5), torch.randn(2, 3, 5, dtype=torch.float64), INDICES, VALID),
        (torch.randn(1, 6, 5).expand(2, 6, 5), torch.randn(2, 3, 5), INDEX, None),
        (torch.randn(2, 6, 9)[..., ::2], torch.randn(2, 3, 5), INDEX, None),
    ],
    "contiguous_rows": [
        (torch.randn(2, 6, 5),),
        (channels_first(2, 6, 5),),
        (channels_first(2, 6, 5, 2).half(),),
        (torch.randn(2, 6, 9)[..., ::2],),
    ],
    "gather_taps": [
        (torch.randn(2, 3, 5), torch.randn(2, 6, 5), HALO, TABLE, 0.0),
        (torch.randn(2, 3, 5, 2), channels_first(2, 6, 5, 2).half(), HALO, TABLES, -torch.inf),
    ],
    "conv_rows": [
        (torch.randn(2, 3, 4), torch.randn(2, 6, 4), HALO, TABLE, torch.randn(6, 16), torch.randn(6), 1),
        (torch.randn(2, 3, 4), channels_first(2, 6, 4), HALO, TABLES, torch.randn(6, 8), None, 2),
        (torch.randn(2, 3, 4), torch.randn(2, 6, 4), HALO, TABLES, torch.randn(4, 4), torch.randn(4), 4),
        (torch.randn(2, 3, 4), torch.randn(2, 6, 4), HALO, TABLES, torch.randn(600_000, 16), None, 1),
    ],
    "pack_conv_weight": [
        (torch.randn(6, 4, 3, 2), False, 1),
        (torch.randn(6, 4, 1, 1), False, 1),
        (torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last), False, 2),
        (torch.randn(6, 4, 3, 2), True, 2),
        (torch.randn(6, 1, 1, 1), True, 1),
    ],
    "attention_rows": [
        (
            *(torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 5)),
            *(torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 5), INDEX, None, None),
        ),
        (
            *(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)),
            *(torch.randn(2, 6, 2, 4).half(), channels_first(2, 6, 2, 4), INDICES, VALID, 0.5),
        ),
    ],
    "norm_record": [(torch.randn(2, 6, 8), 4), (channels_first(2, 6, 8).half(), 1)],
    "norm_partials": [(torch.randn(2, 3, 8), torch.randn(2, 4)), (torch.randn(2, 3, 8).half(), torch.randn(2, 8))],
    "norm_totals": [
        (torch.randn(2, 2, 4), torch.randn(2, 6, 2, 4), torch.randn(2, 3, 2, 4), INDEX, None),
        (torch.randn(2, 2, 4), torch.randn(2, 6, 2, 4), torch.randn(2, 3, 2, 4), INDICES, VALID),
    ],
    "norm_apply": [
        (torch.randn(2, 3, 8), torch.randn(2, 4), torch.rand(2, 2, 4), torch.randn(8), torch.randn(8), 1e-5, 12),
        (torch.randn(2, 3, 8).half(), torch.randn(2, 4), torch.rand(2, 2, 4), None, torch.randn(8).half(), 1e-5, 12),
        (channels_first(2, 3, 8), torch.randn(2, 1), torch.rand(2, 2, 1), None, None, 1e-5, 48),
    ],
    "pack_matrix": [(torch.randn(6, 16),), (torch.randn(16, 6).t(),)],
    "pack_tile_weights": [(torch.randn(6, 4, 3, 3, dtype=torch.float64),), (torch.randn(6, 4, 3, 3),)],
    "conv_tiles": [
        (torch.randn(2, 3, 4), torch.randn(2, 16, 4), HALO, PATCHES, PLACE, INDEX % 4, TILE_WEIGHTS, torch.randn(6)),
        (torch.randn(2, 3, 4), channels_first(2, 16, 4), HALO, PATCHES, PLACE, INDICES % 4, TILE_WEIGHTS, None),
    ],
    "conv_dense": [
        (torch.randn(2, 3, 4), torch.randn(2, 16, 4), INDEX, None, KERNEL, torch.randn(6), 4, 4),
        (torch.randn(2, 3, 4), channels_first(2, 16, 4), INDICES, VALID, KERNEL, None, 2, 8),
    ],
    "conv_map_tiles": [
        (torch.randn(2, 4, 4, 6), None, TILE_WEIGHTS, torch.randn(6), False),
        (torch.randn(1, 4, 2, 2), torch.randn(1, 4, 4), TILE_WEIGHTS, None, True),
    ],
    "conv_map": [
        (torch.randn(2, 4, 4, 6), None, KERNEL, torch.randn(6), TILE_WEIGHTS, False),
        (torch.randn(2, 4, 4, 6).to(memory_format=torch.channels_last), None, KERNEL, None, TILE_WEIGHTS, True),
    ],
    "conv_choice": [
        (
            *(torch.randn(2, 3, 4), torch.randn(2, 16, 4), HALO, TABLE9, torch.randn(6, 36), torch.randn(6)),
            *([HALO, PATCHES, PLACE, INDEX % 4], [], INDEX, None, KERNEL, 4, 4),
        ),
    ],
    "linear_map": [
        (torch.randn(2, 5, 4), torch.randn(6, 4), torch.randn(6, 4), torch.randn(6)),
        (torch.randn(2, 4, 5).transpose(1, 2), torch.randn(6, 4), torch.randn(6, 4), None),
    ],
    "linear_rows": [
        (torch.randn(2, 3, 16), torch.randn(6, 16), torch.randn(6)),
        (channels_first(2, 3, 16), torch.randn(6, 16), None),
    ],
    "as_strided": [(torch.randn(2, 10), [3, 4], [2, 1]), (channels_first(2, 3, 4), [2, 5], [12, 1])],
    "complex_of_pairs": [(torch.randn(3, 2),), (torch.randn(2, 3).double().t(),)],
    "reinterpreted": [(torch.randn(2, 3), torch.int16), (channels_first(2, 3, 4), torch.int32)],
    "pixel_select": [(torch.randn(2, 3, 1, 8), INDEX % 4, 2), (torch.randn(2, 3, 1, 9), INDICES, 3)],
}
CASES = [
    pytest.param(name, arguments, id=f"{name}-{number}")
    for name, samples in SAMPLES.items()
    for number, arguments in enumerate(samples)
]


SCHEMAS = {
    "as_strided": "(Tensor values, SymInt[] size, SymInt[] stride) -> Tensor",
    "attention_rows": "(Tensor query, Tensor key, Tensor value, Tensor recorded_key, Tensor recorded_value, "
    "Tensor index, Tensor? valid, float? scale) -> Tensor",
    "complex_of_pairs": "(Tensor values) -> Tensor",
    "contiguous_rows": "(Tensor rows) -> Tensor",
    "conv_choice": "(Tensor rows, Tensor recorded, Tensor halo, Tensor table, Tensor weight, Tensor? bias, "
    "Tensor[] tile_plan, Tensor[] tile_weights, Tensor index, Tensor? valid, Tensor dense_weight, SymInt height, "
    "SymInt width) -> Tensor",
    "conv_dense": "(Tensor rows, Tensor recorded, Tensor index, Tensor? valid, Tensor weight, Tensor? bias, "
    "SymInt height, SymInt width) -> Tensor",
    "conv_map": "(Tensor map, Tensor? rows, Tensor weight, Tensor? bias, Tensor[] tile_weights, bool channels_last) "
    "-> Tensor",
    "conv_map_tiles": "(Tensor map, Tensor? rows, Tensor[] weights, Tensor? bias, bool channels_last) -> Tensor",
    "conv_rows": "(Tensor rows, Tensor recorded, Tensor halo, Tensor table, Tensor weight, Tensor? bias, "
    "SymInt groups) -> Tensor",
    "conv_tiles": "(Tensor rows, Tensor recorded, Tensor halo, Tensor table, Tensor place, Tensor subposition, "
    "Tensor[] weights, Tensor? bias) -> Tensor",
    "gather_rows": "(Tensor map, Tensor index) -> Tensor",
    "gather_taps": "(Tensor rows, Tensor recorded, Tensor halo, Tensor table, float fill) -> Tensor",
    "linear_map": "(Tensor map, Tensor weight, Tensor packed, Tensor? bias) -> Tensor",
    "linear_rows": "(Tensor rows, Tensor weight, Tensor? bias) -> Tensor",
    "norm_apply": "(Tensor rows, Tensor center, Tensor totals, Tensor? weight, Tensor? bias, float eps, "
    "SymInt count) -> Tensor",
    "norm_partials": "(Tensor rows, Tensor center) -> Tensor",
    "norm_record": "(Tensor map, SymInt groups) -> (Tensor center, Tensor partials, Tensor totals)",
    "norm_totals": "(Tensor totals, Tensor recorded_partials, Tensor new_partials, Tensor index, Tensor? valid) "
    "-> Tensor",
    "pack_conv_weight": "(Tensor weight, bool transposed, SymInt groups) -> Tensor",
    "pack_matrix": "(Tensor(a) weight, SymInt? rows=None) -> Tensor(a)",
    "pack_tile_weights": "(Tensor weight, SymInt? rows=None) -> Tensor[]",
    "pixel_select": "(Tensor taps, Tensor subposition, SymInt factor, SymInt? factor_x=None) -> Tensor",
    "reinterpreted": "(Tensor values, ScalarType dtype) -> Tensor",
    "scatter_rows": "(Tensor map, Tensor rows, Tensor index, Tensor? valid) -> Tensor",
}
#: What annotations alone would make of those that are written out: they cannot name results, or call them views.
INFERRED = {
    "pack_matrix": "(Tensor weight, SymInt? rows=None) -> Tensor",
    "norm_record": "(Tensor map, SymInt groups) -> (Tensor, Tensor, Tensor)",
}
#: Operators of PyTorch that are computed in another way.
STAND_INS = {"attend": torch.ops.aten.scaled_dot_product_attention.default, "convolve": torch.ops.aten.conv2d.default}


def own(name: str) -> torch._ops.OpOverload:
    overload: torch._ops.OpOverload = getattr(torch.ops.fisedit, name).default
    return overload


def test_every_operator_is_sampled_and_exported() -> None:
    registered = {operator.name: operator for operator in OPERATORS.values()}
    assert registered.keys() == SAMPLES.keys() | STAND_INS.keys()
    for name, operator in registered.items():
        assert operator.overload is (STAND_INS[name] if name in STAND_INS else own(name))
        assert getattr(ops, name) is choosing.function(operator)
        ranks = [implementation.rank for implementation in operator.implementations]
        assert ranks[0] == 0 and all(rank > 0 for rank in ranks[1:]), "one is the usual one"


def test_schemas_stay_what_they_are() -> None:
    assert {name: str(own(name)._schema) for name in SAMPLES} == {
        name: f"fisedit::{name}{schema}" for name, schema in SCHEMAS.items()
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_written_out_only_where_it_cannot_be_inferred(name: str) -> None:
    operator = OPERATORS[own(name)]
    assert operator.shape is not None
    assert infer_schema(operator.arguments, operator.shape) == INFERRED.get(name, SCHEMAS[name])
    assert name not in INFERRED or INFERRED[name] != SCHEMAS[name]


@pytest.mark.parametrize("name", SCHEMAS)
def test_arguments_are_named_as_in_the_schema_and_documented(name: str) -> None:
    schema, arguments = own(name)._schema, OPERATORS[own(name)].arguments
    fields: tuple[str, ...] = arguments._fields  # type: ignore[attr-defined]
    assert tuple(argument.name for argument in schema.arguments) == fields
    lines = (arguments.__doc__ or "").splitlines()
    for field in fields:
        assert any(re.search(rf"\b{field}\b.*:", line) for line in lines), f"{field} is not documented"


#: Their results are opaque: without strides or storage, they can be compared with nothing.
OPAQUE = {"pack_matrix", "pack_tile_weights"}


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_opcheck(name: str, arguments: tuple) -> None:
    overload = getattr(torch.ops.fisedit, name).default
    if name in OPAQUE:
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_autograd_registration"))
    else:
        torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize(("name", "arguments"), [case for case in CASES if case.values[0] not in OPAQUE])
def test_dispatcher_and_function_agree(name: str, arguments: tuple) -> None:
    function: Callable = getattr(ops, name)
    direct, dispatched = function(*arguments), getattr(torch.ops.fisedit, name)(*arguments)
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (direct, dispatched)), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all() or name == "gather_taps"
