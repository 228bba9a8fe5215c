"""Canvases and active sets worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from support.canvas import Canvas, Piece, Sheet, canvas, hole, join, meet, overhang, whole
from support.reference import Reference, reduce_mask


def shares(value: Canvas) -> list[list[tuple[float, float]]]:
    """What each position covers, in positions of a mask with as many cells."""
    count = value.size
    return [
        [(float(piece.begin * count), float(piece.end * count)) for piece in value.parts(at, at + 1)]  # type: ignore
        for at in range(count)
    ]


def cells(value: Canvas, count: int) -> list[list[int]]:
    """The numbers of the mask cells of each position."""
    return [row.nonzero().flatten().tolist() for row in value.covers(count)]


def marks(value: Canvas) -> list[bool]:
    """Which positions are padding throughout."""
    return [all(piece.padding for piece in value.parts(at, at + 1)) for at in range(value.size)]


def test_the_whole_map_covers_what_the_mask_is_reduced_to() -> None:
    for size in range(1, 12):
        for count in range(1, 12):
            mask = torch.eye(count, dtype=torch.bool)[:, :, None]
            assert torch.equal(whole(size).covers(count).T[:, :, None], reduce_mask(mask, size, 1))


def test_a_flip_reverses() -> None:
    assert cells(whole(4).reversed(), 4) == [[3], [2], [1], [0]]
    assert shares(whole(2).reversed()) == [[(2, 1)], [(1, 0)]]
    assert whole(5).reversed().reversed() == whole(5)


def test_a_crop_cuts_its_share() -> None:
    cropped = whole(6).windowed(1, 1, 1, -1, 4)
    assert cells(cropped, 6) == [[1], [2], [3], [4]]
    assert cells(cropped.resized(2), 6) == [[1, 2], [3, 4]]


def test_a_constant_pad_holds_the_edge() -> None:
    padded = whole(3).extended(2, 1)
    assert cells(padded, 3) == [[0], [0], [0], [1], [2], [2]]
    assert marks(padded) == [True, True, False, False, False, True]
    assert padded.extended(-2, -1) == whole(3)
    assert cells(whole(3).extended(-1, 2), 3) == [[1], [2], [2], [2]]


def test_half_a_position_is_squeezed() -> None:
    padded = whole(2).extended(Fraction(3, 2), 0)
    assert padded.length == Fraction(7, 2)
    first, second, *_ = padded.pieces
    assert (first.length, first.begin, first.end) == (Fraction(1, 2), 0, Fraction(1, 2))
    assert (second.length, second.begin, second.end) == (1, 0, Fraction(1, 2))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("reflect", [[2], [1], [0], [1], [2], [3], [2]]),
        ("replicate", [[0], [0], [0], [1], [2], [3], [3]]),
        ("circular", [[2], [3], [0], [1], [2], [3], [0]]),
        ("constant", [[0], [0], [0], [1], [2], [3], [3]]),
    ],
)
def test_pads_of_every_mode(mode: str, expected: list[list[int]]) -> None:
    reference = reference_of(lambda x: functional.pad(x, (2, 1, 0, 0), mode=mode), (5, 4))
    (sheet,) = output_field(reference).sheets
    assert cells(sheet.columns, 4) == expected
    assert any(marks(sheet.columns)) == (mode == "constant")
    assert sheet.rows == whole(5)


def test_a_roll_cuts_and_swaps() -> None:
    reference = reference_of(lambda x: torch.roll(x, (1, -2), (2, 3)), (4, 5))
    (sheet,) = output_field(reference).sheets
    assert cells(sheet.rows, 4) == [[3], [0], [1], [2]]
    assert cells(sheet.columns, 5) == [[2], [3], [4], [0], [1]]


@pytest.mark.parametrize(
    ("window", "sizes", "expected"),
    [
        ((3, 1, 1, 1), (9, 9), (0, 0)),  # kernel, dilation, stride, padding
        ((3, 1, 1, 0), (9, 7), (1, 1)),
        ((3, 1, 1, 2), (9, 11), (-1, -1)),
        ((2, 1, 1, 0), (9, 8), (Fraction(1, 2), Fraction(1, 2))),
        ((5, 2, 1, 4), (9, 9), (0, 0)),
        ((3, 1, 2, 1), (9, 5), (0, 0)),
        ((3, 1, 2, 1), (8, 4), (0, 0)),
        ((2, 1, 2, 0), (9, 4), (0, 1)),  # odd pooling
        ((2, 1, 2, 0), (9, 5), (0, 0)),  # rounded up
        ((3, 1, 2, 0), (9, 4), (0, 1)),  # the autoencoder's, behind its pad of (0, 1)
        ((7, 1, 2, 0), (13, 4), (2, 3)),
        ((1, 1, 2, 0), (9, 5), (0, 0)),
        ((1, 1, 2, -1), (9, 4), (0, 1)),
    ],
)
def test_what_windows_leave_out(window: tuple[int, ...], sizes: tuple[int, int], expected: tuple[int, int]) -> None:
    assert overhang(*window, *sizes) == expected


def test_odd_pooling_cuts_one_position() -> None:
    pooled = whole(5).windowed(2, 1, 2, 0, 2)
    assert cells(pooled, 5) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("size", [8, 16, 24])
def test_the_autoencoders_pad_and_stride_at_multiples_of_eight(size: int) -> None:
    value = whole(size)
    for _ in range(3):
        value = value.extended(0, 1).windowed(3, 1, 2, 0, value.size // 2)
    assert value == whole(size // 8)
    assert whole(9).extended(0, 1).windowed(3, 1, 2, 0, 4) != whole(4)


def test_odd_sizes_do_not_grow_on_the_way_down_and_up() -> None:
    lower = whole(27).windowed(3, 1, 2, 1, 14)
    assert lower == whole(14)
    assert lower.resized(27) == whole(27)


def test_transposed_convolutions_are_the_adjoint() -> None:
    assert whole(5).transposed(4, 1, 2, 1, 10) == whole(10)
    assert whole(5).transposed(3, 1, 2, 1, 10) == whole(10)
    assert whole(5).transposed(3, 1, 1, 1, 5) == whole(5)
    grown = whole(3).transposed(3, 1, 1, 0, 5)  # reaches one position beyond each edge
    assert cells(grown, 3) == [[0], [0], [1], [2], [2]]
    assert marks(grown) == [True, False, False, False, True]
    assert grown.windowed(3, 1, 1, 0, 3) == whole(3)
    left_over = whole(4).transposed(2, 1, 2, 0, 9)  # one position of output padding
    assert cells(left_over, 4) == [[0], [0], [1], [1], [2], [2], [3], [3], [3]]


def test_halves_of_a_join_are_the_whole() -> None:
    top, bottom = whole(6).parts(0, 2), whole(6).parts(2, 6)
    parts = [(Sheet(canvas(top), whole(4)),), (Sheet(canvas(bottom), whole(4)),)]
    assert join(parts, along_rows=True) == (Sheet(whole(6), whole(4)),)
    (swapped,) = join(parts[::-1], along_rows=True)
    assert cells(swapped.rows, 6) == [[2], [3], [4], [5], [0], [1]]


def test_joined_values_that_differ_along_the_other_axis_are_two_sheets() -> None:
    parts = [(Sheet(whole(2), whole(3)),), (Sheet(whole(2), whole(3).reversed()),)]
    first, second = join(parts, along_rows=True)
    assert cells(first.rows, 2) == [[0], [1], [], []]
    assert cells(second.rows, 2) == [[], [], [0], [1]]


def test_values_that_meet_have_the_sets_of_both() -> None:
    plain, flipped = Sheet(whole(4), whole(3)), Sheet(whole(4).reversed(), whole(3))
    assert meet([plain, flipped, plain]) == (plain, flipped)
    padded = Sheet(whole(4).extended(-1, 0).extended(1, 0), whole(3))
    assert meet([padded, plain]) == meet([plain, padded]) == (plain,)
    other = Sheet(whole(4).extended(-2, 0).extended(2, 0), whole(3))
    assert len(meet([padded, other])) == 1  # the one that pads less
    assert Sheet(whole(3), whole(3)) != Sheet(whole(3), whole(3)).swapped()


def test_pieces_without_an_interval_cover_nothing() -> None:
    assert cells(hole(2), 3) == [[], []]
    assert canvas([Piece(Fraction(1), None, None), Piece(Fraction(2), None, None)]) == hole(3)


def reference_of(function: Callable[[Tensor], Tensor], size: tuple[int, int]) -> Reference:
    """The reference of a function of a map ``[1, 2, height, width]``."""

    class Applied(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return Reference(Applied(), (torch.randn(1, 2, *size),), maps=True)


def output_field(reference: Reference):  # type: ignore[no-untyped-def]
    """What is known of the only output."""
    (node,) = reference.results
    return reference.fields[node.name][0]


def active_columns(function: Callable[[Tensor], Tensor], marked: int, size: tuple[int, int] = (5, 9)) -> list[int]:
    """The active columns of a function's result, for a mask of one column."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[:, marked] = True
    reference = reference_of(function, size)
    active = output_field(reference).active(reference.prepared(mask))
    return active[0].any(0).nonzero().flatten().tolist()


def test_active_positions_of_movers() -> None:
    assert active_columns(lambda x: x.flip(-1), 1) == [7]
    assert active_columns(lambda x: x[..., 2:], 3) == [1]
    assert active_columns(lambda x: x[..., 2:], 1) == []
    assert active_columns(lambda x: functional.pad(x, (3, 0)), 0) == [0, 1, 2, 3]
    assert active_columns(lambda x: torch.roll(x, 2, -1), 8) == [1]
    assert active_columns(lambda x: torch.cat([x, x.flip(-1)], 3), 1) == [1, 16]
    assert active_columns(lambda x: torch.cat([x, x.flip(-1)], 1), 1) == [1, 7]
    assert active_columns(lambda x: x + x.flip(-1), 1) == [1, 7]
    assert active_columns(lambda x: functional.max_pool2d(x, 2), 8) == []
    assert active_columns(lambda x: functional.max_pool2d(x, 2, ceil_mode=True), 8) == [4]


def test_a_transposition_turns_the_mask() -> None:
    mask = torch.zeros(5, 9, dtype=torch.bool)
    mask[1, 7] = True
    reference = reference_of(lambda x: x.transpose(2, 3), (5, 9))
    assert output_field(reference).active(reference.prepared(mask))[0].nonzero().tolist() == [[7, 1]]


def test_closure_covers_what_a_position_depends_on() -> None:
    """Dilated windows at an edge read one tap only, far from where their canvas puts them."""
    weight = torch.ones(2, 2, 1, 2)
    field = output_field(reference_of(lambda x: functional.conv2d(x, weight, padding=(0, 3), dilation=(1, 6)), (5, 9)))
    assert bool(field.strayed.any())
    for position in field.strayed.nonzero().tolist():
        for cell in range(9):
            mask = torch.zeros(1, 5, 9, dtype=torch.bool)
            mask[0, position[0], cell] = True
            if field.touched(mask)[0][tuple(position)]:
                assert field.active(mask)[0][tuple(position)]


def test_outputs_that_are_the_picture_stay_inside_the_mask() -> None:
    mask = torch.zeros(5, 9)
    mask[:, 1] = 1
    flipped = reference_of(lambda x: x + x.flip(-1), (5, 9)).returned(mask)[0]
    assert flipped is not None and flipped[0].any(0).nonzero().flatten().tolist() == [1]
    moved = reference_of(lambda x: x.flip(-1), (5, 9)).returned(mask)[0]
    assert moved is not None and moved[0].any(0).nonzero().flatten().tolist() == [7]
