"""What a compiled graph makes of its inputs: numbers, scalars, and those of edit graphs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch

from fisedit_compile.errors import (
    CallMismatchError,
    GraphError,
    ScalarMismatchError,
)
from fisedit_compile.executing.edit_inputs import EditInputs
from fisedit_compile.executing.executable import Executable
from fisedit_compile.executing.prologues import prologues
from fisedit_compile.passes import DenseProgram, GraphInput, Program
from fisedit_compile.runtime import RecordedCall
from fisedit_compile.runtime.plans import build_plan
from fisedit_compile.tracing.identity import GraphIdentity
from support.executable_setting import DOMAIN, INFOS, MASK, PICTURE, Setting, dense, program_of
from support.tolerances import assert_identical


@pytest.fixture
def setting() -> Iterator[Setting]:
    prologues.clear()
    yield Setting()
    prologues.clear()


def test_a_graph_without_spatial_inputs_runs_densely_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    shared = {field.name: getattr(program_of(), field.name) for field in fields(Program)}
    program = DenseProgram(**shared)
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
    (record,) = caplog.records
    assert record.getMessage() == "the test graph runs densely and is not masked: dropout is random"
    with setting.runtime.edit("base", mask=MASK, save_as="next"):
        assert_identical(setting(5, 1.0), setting.dense(5, 1.0))
        setting(5, 2.0)
    with pytest.raises(CallMismatchError), setting.runtime.edit("next", mask=MASK):
        setting(5, 1.0)
    with pytest.raises(ScalarMismatchError, match=r"got 7\.0") as caught, setting.runtime.edit("next", mask=MASK):
        setting(5, 7.0)
    assert "is not masked; of networks that choose by their data" in "".join(caught.value.__notes__)


def numbered(*numbers: int, constants: frozenset[int] = frozenset(), steady: tuple[int, ...] = ()) -> Setting:
    return Setting(identity=GraphIdentity("hash", "the test graph", INFOS, numbers, constants, steady=steady))


def test_a_python_number_that_has_to_be_steady_and_changes_is_refused() -> None:
    setting = numbered(2, steady=(2,))
    with pytest.raises(ScalarMismatchError, match=r"number time changed from 1.0 to 2.0 .*torch.tensor"):
        setting.record(1.0, 1.0, 2.0)
    assert setting.runtime.bases == ()


def test_a_python_number_that_differs_in_the_edit_is_explained() -> None:
    setting = numbered(2)
    setting.record(3.0)
    with pytest.raises(ScalarMismatchError) as caught, setting.runtime.edit("base", mask=MASK):
        setting(5, 4.0)
    assert "time came as a Python number" in "".join(caught.value.__notes__)


def test_a_python_number_that_changes_as_it_did_is_fine() -> None:
    setting = numbered(2)
    setting.record(3.0, 4.0)
    with setting.runtime.edit("base", mask=MASK):
        setting(5, 3.0)
        setting(5, 4.0)


def test_a_steady_python_number_that_stays_is_fine() -> None:
    setting = numbered(2, steady=(2,))
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
        values = inputs.assemble((1, 2, 3), (torch.zeros(3),), (), plan, call)
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
