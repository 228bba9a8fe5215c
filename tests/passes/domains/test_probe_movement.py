"""probe_movement: how operators without a rule move positions, seen by running them."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.options import Options
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.domains.propagate_domains import propagate_domains
from fisedit_compile.passes.manager import families
from fisedit_compile.runtime.spec import Domain
from support.graphs import GraphBuilder, aten

SIZE = (6, 10)


def placed(make) -> tuple[Domain, Report]:
    """Where the result of what ``make`` builds on a 6x10 picture lies, and what was reported."""
    builder = GraphBuilder()
    x = builder.call(aten.conv2d.default, builder.input(1, 3, *SIZE), builder.parameter(4, 3, 1, 1))
    node = make(builder, x)
    end = builder.call(aten.conv2d.default, node, builder.parameter(2, node.meta["val"].shape[1], 1, 1))
    compilation = Compilation(builder.module(end), tuple(builder.infos), families=families(Options()))
    propagate_domains(compilation)
    return node.meta["spatial"].domain, compilation.report


def indexed(b: GraphBuilder, x, positions: list[int]):
    steps = b.call(aten.arange.start_step, positions[0], positions[1], positions[2])
    return b.call(aten.index_select.default, x, 3, steps)


@pytest.mark.parametrize(
    "make",
    [
        lambda b, x: b.call(aten.cumprod.default, x, 3),
        lambda b, x: b.call(aten.logcumsumexp.default, x, 2),
        lambda b, x: b.call(aten.sub.Tensor, x, b.call(aten.mean.dim, x, [2, 3], True)),
        lambda b, x: b.piece(b.call(aten.sort.default, x, 1), 0),
        lambda b, x: indexed(b, x, [0, 10, 1]),
    ],
)
def test_what_depends_on_its_own_position_stays(make) -> None:
    domain, report = placed(make)
    assert domain == Domain(*SIZE) and not report.lost


def test_windows_in_the_batch_stay_where_they_are() -> None:
    def windows(b: GraphBuilder, x):
        cut = b.call(aten.permute.default, b.call(aten.reshape.default, x, [1, 4, 3, 2, 5, 2]), [0, 2, 4, 1, 3, 5])
        folded = b.call(aten.reshape.default, cut, [15, 4, 2, 2])
        mixed = b.call(aten.cumsum.default, b.call(aten.flip.default, folded, [0]), 2)
        back = b.call(aten.reshape.default, b.call(aten.flip.default, mixed, [0]), [1, 3, 5, 4, 2, 2])
        return b.call(aten.reshape.default, b.call(aten.permute.default, back, [0, 3, 1, 4, 2, 5]), [1, 4, *SIZE])

    domain, report = placed(windows)
    assert domain == Domain(*SIZE) and not report.lost


def test_a_table_moves_as_a_flip_does() -> None:
    by_table, report = placed(lambda b, x: indexed(b, x, [9, -1, -1]))
    by_rule, _ = placed(lambda b, x: b.call(aten.flip.default, x, [3]))
    assert by_table == by_rule and not by_rule.cover.whole and not report.lost


def folded(forgetting):
    """Channels folded into the batch, of which what is turned shows NaN, and what is read in place does not."""

    def make(b: GraphBuilder, x):
        merged = b.call(aten.reshape.default, x, [4, *SIZE])
        turned = b.call(aten.flip.default, merged, [2])
        mixed = b.call(aten.add.Tensor, turned, forgetting(b, merged))
        return b.call(aten.reshape.default, mixed, [1, 4, *SIZE])

    return make


FORGETTING = {
    "NaN in place of none": lambda b, x: b.call(aten.nan_to_num.default, x),
    "the greater of two": lambda b, x: b.call(aten.fmax.default, x, b.call(aten.zeros_like.default, x)),
    "a comparison": lambda b, x: b.call(aten._to_copy.default, b.call(aten.gt.Scalar, x, 0.7), dtype=torch.float32),
    "places of the greatest": lambda b, x: b.call(
        aten._to_copy.default, b.call(aten.argmax.default, x, 0, True), dtype=torch.float32
    ),
}


@pytest.mark.parametrize("name", FORGETTING)
def test_what_forgets_marks_is_no_table(name: str) -> None:
    """A table would say that each position is the turned one alone, and leave its own place out."""
    domain, report = placed(folded(FORGETTING[name]))
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[0, 2, 1] = True
    active = domain.cover.active(mask)
    assert bool(active[0, 2, 1]) and bool(active[0, 2, 8])
    assert [lost.reason for lost in report.lost] == ["its positions do not stay where they are"]


def test_what_forgets_nothing_is_a_table() -> None:
    domain, report = placed(folded(lambda b, x: b.call(aten.zeros_like.default, x)))
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[0, 2, 1] = True
    assert not report.lost and domain.cover.active(mask)[0].nonzero().tolist() == [[2, 8]]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda b, x: b.piece(b.call(aten.sort.default, x, 3), 0), "its order or its places come from the values"),
        (
            lambda b, x: b.call(aten.index_select.default, x, 3, b.input(10, name="i", dtype=torch.int64)),
            "reads its indices from a tensor",
        ),
        (
            lambda b, x: b.call(
                aten.unflatten.int,
                b.call(aten.roll.default, b.call(aten.flatten.using_ints, x, 2), [3], [2]),
                2,
                list(SIZE),
            ),
            "its positions do not stay where they are",
        ),
    ],
)
def test_what_is_unknown_is_active_everywhere_and_says_why(make, reason) -> None:
    domain, report = placed(make)
    mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[1, 5, 0] = True
    active = domain.cover.active(mask)
    assert bool(active[1].all()) and not bool(active[0].any())
    assert len(report.lost) == 1 and reason in report.lost[0].reason
