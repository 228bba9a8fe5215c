"""canvas: pieces of one axis, and what operators do to them."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from fisedit_compile.passes.domains.geometry.canvas import Canvas, alike, overlaid, window_cuts


def shares(canvas: Canvas, size: int) -> list[list[tuple[Fraction, Fraction]]]:
    """What each position covers, in positions of a mask of ``size``."""
    return [
        [(piece.begin * size, piece.end * size) for piece in canvas.part(at, at + 1).pieces if not piece.empty]
        for at in range(int(canvas.size))
    ]


def test_what_resizes_keeps_the_canvas_exactly() -> None:
    down = Canvas.whole(27).resized(14)
    assert down == Canvas.whole(14) and down.resized(27) == Canvas.whole(27)


def test_a_crop_takes_its_share() -> None:
    assert shares(Canvas.whole(5).part(1, 4), 5) == [[(1, 2)], [(2, 3)], [(3, 4)]]


def test_a_flip_reverses_and_two_flips_do_nothing() -> None:
    flipped = Canvas.whole(3).reversed()
    assert shares(flipped, 3) == [[(3, 2)], [(2, 1)], [(1, 0)]]
    assert flipped.reversed() == Canvas.whole(3)


def test_what_is_cut_and_joined_again_is_one_piece() -> None:
    whole = Canvas.whole(7)
    assert Canvas.joined([whole.part(0, 3), whole.part(3, 7)]) == whole


def test_padding_holds_the_edge_and_a_fraction_of_a_position_all_of_it() -> None:
    padded = Canvas.whole(4).padded(Fraction(3, 2), -1)
    assert padded.size == Fraction(9, 2)
    assert [(piece.length, piece.begin * 4, piece.end * 4, piece.padding) for piece in padded.pieces] == [
        (Fraction(1, 2), 0, 1, True),
        (1, 0, 1, True),
        (3, 0, 3, False),
    ]


def test_tables_take_positions_and_leave_what_is_in_none_empty() -> None:
    taken = Canvas.whole(4).taken([3, -1, 0])
    assert shares(taken, 4) == [[(3, 4)], [], [(0, 1)]]
    assert taken.cells(3, 4).tolist() == [[False] * 3 + [True], [False] * 4, [True] + [False] * 3]


@pytest.mark.parametrize(
    ("kernel", "dilation", "stride", "padding", "before", "after", "expected"),
    [
        (3, 1, 1, 1, 9, 9, (0, 0)),
        (3, 1, 2, 1, 9, 5, (0, 0)),  # the last window reaches beyond
        (3, 1, 2, 1, 10, 5, (0, 0)),
        (3, 1, 1, 0, 9, 7, (1, 1)),
        (3, 1, 1, 2, 9, 11, (-1, -1)),
        (2, 1, 2, 0, 9, 4, (0, 1)),
        (3, 1, 2, 0, 11, 5, (0, 1)),  # behind a pad of one on the right
        (4, 1, 1, 1, 9, 8, (Fraction(1, 2), Fraction(1, 2))),
        (1, 1, 3, -2, 9, 3, (0, 0)),
        (1, 1, 1, -2, 9, 3, (2, 4)),
        (5, 2, 2, 1, 20, 7, (2, 4)),
    ],
)
def test_windows_cut_and_add(kernel, dilation, stride, padding, before, after, expected) -> None:
    assert window_cuts(kernel, dilation, stride, padding, before, after) == expected


def test_a_convolution_without_padding_leaves_out_the_borders() -> None:
    assert shares(Canvas.whole(5).windows(3, 1, 1, 0, 3), 5) == [[(1, 2)], [(2, 3)], [(3, 4)]]


def test_a_transposed_convolution_is_the_adjoint() -> None:
    assert Canvas.whole(5).transposed_windows(4, 1, 2, 1, 10) == Canvas.whole(10)
    made = Canvas.whole(5).transposed_windows(3, 1, 2, 0, 11)  # windows from 11 to 5 leave out one on the right
    assert [(piece.length, piece.padding) for piece in made.pieces] == [(10, False), (1, True)]


def test_canvases_are_alike_whatever_is_marked_and_beside_padding() -> None:
    whole, padded = Canvas.whole(4), Canvas.whole(3).padded(0, 1)
    assert alike(whole, whole.resized(4)) and not alike(whole, padded)
    shifted = Canvas.joined([whole.part(0, 3), whole.part(2, 3).padded(0, 0)])
    marked = Canvas.whole(4).part(0, 3).padded(0, 1)
    assert alike(marked, shifted) and alike(marked, whole, beside_padding=True)
    assert not alike(whole, marked, beside_padding=True)
    assert overlaid(marked, shifted) == shifted


def test_empty_stretches_are_filled_by_each_other_only() -> None:
    first = Canvas.joined([Canvas.whole(2), Canvas.nothing(3)])
    second = Canvas.joined([Canvas.nothing(2), Canvas.whole(3)])
    filled = overlaid(first, second, fill=True)
    assert filled is not None and not any(piece.empty for piece in filled.pieces)
    assert overlaid(filled, second, fill=True) is None


def test_cells_are_those_that_shares_overlap_by_more_than_a_point() -> None:
    assert Canvas.whole(3).cells(3, 6).tolist() == torch.eye(3, dtype=torch.bool).repeat_interleave(2, 1).tolist()
    assert Canvas.whole(2).cells(2, 3).tolist() == [[True, True, False], [False, True, True]]
