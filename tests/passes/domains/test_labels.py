"""Which small inputs are names that an edit may change, and which are numbers that it must keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from fisedit_compile.passes.domains.labels import find_labels
from support.graphs import GraphBuilder

aten = torch.ops.aten
CLASSES, WIDTH = 7, 4

#: What a network makes of its label.
Use = Callable[[GraphBuilder, fx.Node], fx.Node]


def time_embedding(build: GraphBuilder) -> fx.Node:
    """Sines of an integer timestep: the network knows its time."""
    times = build.input(2, name="timestep", kind="scalar", dtype=torch.int64)
    return build.call(aten.sin.default, build.call(aten.mul.Tensor, times, 0.5))


def labels_of(*uses: Use, dtype: torch.dtype = torch.int64, time: bool = True) -> set[str]:
    """Names of the inputs that are labels, among a timestep and an input ``label`` that is used so."""
    build = GraphBuilder()
    label = build.input(2, name="label", kind="scalar", dtype=dtype)
    results = [use(build, label) for use in uses]
    results += [time_embedding(build)] if time else []
    found = find_labels(build.module(*results).graph, build.infos)
    return {build.infos[at].name for at in found}


def embedded(build: GraphBuilder, value: fx.Node) -> fx.Node:
    return build.call(aten.embedding.default, build.parameter(CLASSES, WIDTH), value)


def widened(build: GraphBuilder, label: fx.Node) -> fx.Node:
    return embedded(build, build.call(aten.to.dtype, build.call(aten.expand.default, label, [3, 2]), torch.int64))


def dropped(build: GraphBuilder, label: fx.Node) -> fx.Node:
    """Diffusers and others drop labels by a condition, and join them with those of no class."""
    drop = build.call(aten.logical_not.default, build.call(aten.eq.Scalar, label, 0))
    kept = build.call(aten.where.ScalarSelf, drop, CLASSES - 1, label)
    none = build.call(aten.full_like.default, label, CLASSES - 1)
    return embedded(build, build.call(aten.cat.default, [kept, build.call(aten.masked_fill.Scalar, none, drop, 0)]))


def indexed(build: GraphBuilder, label: fx.Node) -> fx.Node:
    return build.call(aten.index.Tensor, build.parameter(CLASSES, WIDTH), [label])


def selected(build: GraphBuilder, label: fx.Node) -> fx.Node:
    return build.call(aten.index_select.default, build.parameter(CLASSES, WIDTH), 0, label)


def one_hot(build: GraphBuilder, label: fx.Node) -> fx.Node:
    classes = build.call(aten.arange.default, CLASSES)
    same = build.call(aten.eq.Tensor, build.call(aten.unsqueeze.default, label, 1), classes)
    return build.call(aten.to.dtype, same, torch.float32)


def chosen(build: GraphBuilder, label: fx.Node) -> fx.Node:
    condition = build.call(aten.unsqueeze.default, build.call(aten.logical_not.default, label), 1)
    return build.call(aten.where.self, condition, build.parameter(WIDTH), build.parameter(WIDTH))


def waves(build: GraphBuilder, label: fx.Node) -> fx.Node:
    return build.call(aten.cos.default, label)


def scaled(build: GraphBuilder, label: fx.Node) -> fx.Node:
    return embedded(build, build.call(aten.mul.Tensor, label, 1))


def floating(build: GraphBuilder, label: fx.Node) -> fx.Node:
    return build.call(aten.to.dtype, label, torch.float32)


def compared(build: GraphBuilder, label: fx.Node) -> fx.Node:
    return build.call(aten.lt.Scalar, label, 3)


def looked_up_number(build: GraphBuilder, label: fx.Node) -> fx.Node:
    """As the noise level of a timestep is."""
    return build.call(aten.index.Tensor, build.parameter(1000), [label])


def looked_up_in_an_input(build: GraphBuilder, label: fx.Node) -> fx.Node:
    return build.call(aten.embedding.default, build.input(CLASSES, WIDTH, name="prompt"), label)


@pytest.mark.parametrize("use", [embedded, widened, dropped, indexed, selected, one_hot])
def test_names_are_labels(use: Use) -> None:
    assert labels_of(use) == {"label"}


def test_booleans_that_choose_are_labels() -> None:
    assert labels_of(chosen, dtype=torch.bool) == {"label"}


@pytest.mark.parametrize("use", [waves, scaled, floating, compared, looked_up_number, looked_up_in_an_input])
def test_numbers_are_not(use: Use) -> None:
    assert labels_of(use) == set()
    assert labels_of(embedded, use) == set()


def test_what_is_not_used_is_no_label() -> None:
    assert labels_of() == set()
    assert labels_of(lambda build, label: build.call(aten.zeros_like.default, label)) == set()


def test_an_output_is_no_label() -> None:
    assert labels_of(embedded, lambda build, label: label) == set()


def test_numbers_with_fractions_are_not() -> None:
    choose: Use = lambda build, label: build.call(aten.eq.Scalar, label, 0)  # noqa: E731
    assert labels_of(choose) == {"label"}
    assert labels_of(choose, dtype=torch.float32) == set()


def test_without_a_time_a_name_may_be_the_time() -> None:
    assert labels_of(embedded, time=False) == set()


def test_sines_of_the_picture_are_no_time() -> None:
    def activated(build: GraphBuilder, label: fx.Node) -> fx.Node:
        return build.call(aten.sin.default, build.call(aten.add.Tensor, build.picture(), time(build)))

    def time(build: GraphBuilder) -> fx.Node:
        return build.input(1, name="scale", kind="scalar")

    assert labels_of(embedded, activated, time=False) == set()


def test_sines_of_the_label_itself_are_no_time() -> None:
    def wave(build: GraphBuilder, label: fx.Node) -> fx.Node:
        return build.call(aten.sin.default, embedded(build, label))

    assert labels_of(wave, time=False) == set()
