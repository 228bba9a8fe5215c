"""Masks: what is accepted, what is refused, and how a mask reaches another resolution or batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fisedit_compile.errors import FisEditError, MaskError, OptionError
from fisedit_compile.runtime.masks import prepare_mask, reduce_mask, tile_mask
from fisedit_compile.runtime.spec import Domain

PATTERN = np.array([[0, 1, 0], [1, 0, 0]])
EXPECTED = torch.from_numpy(PATTERN > 0)[None]


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    + [torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_torch_dtypes(dtype: torch.dtype) -> None:
    prepared = prepare_mask(torch.from_numpy(PATTERN).to(dtype))
    assert prepared.dtype == torch.bool
    assert torch.equal(prepared, EXPECTED)


def test_sparse_tensors() -> None:
    assert torch.equal(prepare_mask(torch.from_numpy(PATTERN).float().to_sparse()), EXPECTED)


@pytest.mark.parametrize("dtype", ["bool", "u1", "u2", "u4", "u8", "i1", "i8", "f2", "f4", "f8", ">f4", ">i4"])
def test_numpy_dtypes(dtype: str) -> None:
    array = PATTERN.astype(dtype)
    array.setflags(write=False)
    assert torch.equal(prepare_mask(array), EXPECTED)
    assert torch.equal(prepare_mask(np.stack([array, array])), EXPECTED.repeat(2, 1, 1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I", "F", "I;16", "CMYK", "HSV"])
def test_image_modes(mode: str) -> None:
    grey = Image.fromarray((PATTERN * 255).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((PATTERN * 65535).astype(np.uint16))
    elif mode in ("CMYK", "HSV"):
        image = grey.convert("RGB").convert(mode)
    else:
        image = grey.convert(mode)
    assert image.mode == mode
    assert torch.equal(prepare_mask(image), EXPECTED)


def test_transparent_pixels_are_black() -> None:
    white = np.full((2, 3, 4), 255, np.uint8)
    white[..., 3] = PATTERN * 255
    assert torch.equal(prepare_mask(Image.fromarray(white, "RGBA")), EXPECTED)


def test_palette_order_does_not_matter() -> None:
    """In a palette image, entry 0 may well be white."""
    image = Image.fromarray((1 - PATTERN).astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([255, 255, 255, 0, 0, 0])
    assert torch.equal(prepare_mask(image), EXPECTED)


def test_white_reaches_half_of_the_scale() -> None:
    levels = [0, 1, 127, 128, 255]
    expected = [[[False, False, False, True, True]]]
    for values in (
        torch.tensor([levels], dtype=torch.uint8),
        np.array([levels], np.uint8),
        np.array([levels], np.int16),
        np.array([levels], np.int64),
        torch.tensor([levels], dtype=torch.float16),
        np.array([levels], np.uint16) * 257,
        np.array([levels], np.int32) * 257,
        torch.tensor([levels], dtype=torch.float64) / 255,
        Image.fromarray(np.array([levels], np.uint8)),
        Image.fromarray(np.array([levels], np.uint16) * 257),
        Image.fromarray(np.array([levels], np.int32)),
        [levels],
    ):
        assert prepare_mask(values).tolist() == expected, values
    assert prepare_mask(np.array([[255, 32767, 32768]], np.uint16)).tolist() == [[[False, False, True]]]
    assert prepare_mask(torch.tensor([[1e-6, -1.0, 0.0, 0.49, 0.5, 1.0]])).tolist() == [[[False] * 4 + [True] * 2]]


@given(st.sampled_from([8, 16]), st.integers(1, 100), st.lists(st.integers(0, 255), min_size=1, max_size=9))
def test_thresholds_are_shares_of_the_scale(bits: int, percent: int, levels: list[int]) -> None:
    """Compared with whole numbers: no level that reaches a threshold is lost to rounding, in any type."""
    values = np.array([[2, *levels]], np.uint8) if bits == 8 else np.array([[2, *levels]], np.uint16) * 257
    expected = [100 * level >= percent * 255 for level in (2, *levels)]
    assert prepare_mask(values, percent / 100)[0, 0].tolist() == expected
    assert prepare_mask(Image.fromarray(values), percent / 100)[0, 0].tolist() == expected
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        threshold = torch.tensor([[percent / 100, 0.0]], dtype=dtype)
        assert prepare_mask(threshold, percent / 100).tolist() == [[[True, False]]]


def test_zeros_and_ones_are_booleans_but_not_in_pictures_of_eight_bits() -> None:
    for dtype in (np.uint8, np.uint16, np.int8, np.int16, np.uint64):
        assert prepare_mask(PATTERN.astype(dtype)).equal(EXPECTED)
    assert prepare_mask(Image.fromarray(PATTERN.astype(np.int32))).equal(EXPECTED)
    noise = Image.fromarray(PATTERN.astype(np.uint8))
    for mode in ("L", "RGB", "LA", "P"):
        assert not prepare_mask(noise.convert(mode)).any()
    assert prepare_mask(noise, 1 / 255).equal(EXPECTED)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, 128, float("nan"), True, "0.5", None])
def test_thresholds_that_are_no_share(threshold: object) -> None:
    with pytest.raises(OptionError, match=r"white_threshold must be a number above 0 and up to 1, got"):
        prepare_mask(PATTERN, threshold)  # type: ignore[arg-type]


def test_forms_are_taken_for_what_they_are() -> None:
    for mask in (PATTERN, PATTERN * 1.0, (PATTERN * 255).astype(np.uint8)):
        for form in (
            mask[..., None],
            np.stack([mask] * 3, axis=2),
            np.stack([mask] * 3),
            mask[None, None],
            np.stack([mask] * 3, axis=2)[None],
            np.stack([mask] * 3)[None],
            mask[None, ..., None],
        ):
            assert prepare_mask(form).equal(EXPECTED), form.shape
            assert prepare_mask(torch.from_numpy(form), samples=1).equal(EXPECTED), form.shape
        for axis in (1, 3):
            assert prepare_mask(np.expand_dims(np.stack([mask, mask * 0]), axis)).equal(
                torch.cat([EXPECTED, torch.zeros_like(EXPECTED)])
            )
    assert prepare_mask(np.stack([PATTERN > 0] * 3, axis=2)).equal(EXPECTED)


@given(st.lists(st.booleans(), min_size=3 * 24, max_size=3 * 24), st.booleans())
def test_three_masks_that_differ_are_three_masks(flat: list[bool], numbers: bool) -> None:
    masks = torch.tensor(flat).view(3, 4, 6)
    masks[0, 0, 0], masks[1, 0, 0] = True, False
    given_masks = masks.float() if numbers else masks
    assert prepare_mask(given_masks).equal(masks) and prepare_mask(given_masks, samples=3).equal(masks)
    assert prepare_mask(given_masks, samples=2).equal(masks), "it is told where they are counted"


def test_equal_booleans_are_masks_of_three_pictures_unless_there_is_one() -> None:
    masks = EXPECTED.repeat(3, 1, 1)
    assert prepare_mask(masks).equal(masks)
    assert prepare_mask(masks, samples=1).equal(EXPECTED)


def test_pictures_in_colours_as_arrays() -> None:
    box = np.zeros((8, 9), bool)
    box[2:5, 3:7] = True
    red = (box[..., None] * np.array([255, 0, 10])).astype(np.uint8)
    assert prepare_mask(red).equal(torch.from_numpy(box)[None])
    assert prepare_mask(red[None].repeat(2, axis=0)).equal(torch.from_numpy(box)[None].repeat(2, 1, 1))
    paint = np.dstack([red, box * 255]).astype(np.uint8)
    for form in (paint, paint[None], torch.from_numpy(paint)):
        assert prepare_mask(form).equal(torch.from_numpy(box)[None])


def test_sequences() -> None:
    assert torch.equal(prepare_mask(PATTERN.tolist()), EXPECTED)
    image = Image.fromarray((PATTERN * 255).astype(np.uint8))
    assert torch.equal(prepare_mask([image, torch.zeros(2, 3)]), torch.cat([EXPECTED, torch.zeros_like(EXPECTED)]))


def test_the_result_is_independent_of_the_input() -> None:
    source = EXPECTED.clone()
    prepared = prepare_mask(source)
    source.zero_()
    assert torch.equal(prepared, EXPECTED)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(3),
        torch.zeros(1, 2, 3, 5),
        torch.zeros(1, 1, 1, 3, 3),
        torch.arange(90).view(1, 3, 5, 6) / 90,
        torch.tensor([[0.0, 1.5]]),
        torch.tensor([[0.0, 256.0]]),
        torch.tensor([[0.0, float("inf")]]),
        np.array([[-1, 1]]),
        np.array([[0, 127]], np.int8),
        np.array([[0, 65536]]),
        np.array([[0, 2**64 - 1]], np.uint64),
        torch.zeros(0, 4),
        torch.zeros(0, 4, 4),
        torch.tensor([[0.0, float("nan")]]),
        np.array([[np.nan, 1.0]]),
        torch.zeros(2, 2, dtype=torch.complex64),
        np.array([["a"]]),
        np.array([[None]]),
        [[1, 2], [3]],
        [torch.zeros(2, 2), torch.zeros(3, 2)],
        [],
        "mask.png",
        None,
        1.0,
    ],
    ids=repr,
)
def test_refused(mask: object) -> None:
    with pytest.raises(MaskError) as caught:
        prepare_mask(mask)
    assert isinstance(caught.value, FisEditError) and isinstance(caught.value, ValueError)
    assert "got" in str(caught.value)


@given(st.data())
def test_reduce_covers(data: st.DataObject) -> None:
    """A position is active exactly when a mask cell it covers is: PyTorch's adaptive ranges, both directions."""
    height, width, rows, columns = (data.draw(st.integers(1, 9)) for _ in range(4))
    flat = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = torch.tensor(flat).view(1, height, width)
    reduced = reduce_mask(mask, Domain(rows, columns))
    for y in range(rows):
        for x in range(columns):
            top, bottom = y * height // rows, -(-(y + 1) * height // rows)
            left, right = x * width // columns, -(-(x + 1) * width // columns)
            assert reduced[0, y, x] == mask[0, top:bottom, left:right].any()


def test_reduce_keeps_samples_apart() -> None:
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[1, 3, 0] = True
    reduced = reduce_mask(mask, Domain(2, 2))
    assert reduced.nonzero().tolist() == [[1, 1, 0]]
    assert reduced.dtype == torch.bool


def test_tile() -> None:
    mask = torch.rand(2, 3, 4) > 0.5
    assert torch.equal(tile_mask(mask, 4), torch.cat([mask, mask]))
    assert tile_mask(mask, 2) is mask
    assert tile_mask(mask[:1], 4).shape[0] == 1
    with pytest.raises(MaskError, match="batch is 5.*2 samples"):
        tile_mask(mask, 5)
    with pytest.raises(MaskError):
        tile_mask(mask, 1)


def test_a_transparent_colour_is_black(tmp_path: Path) -> None:
    """A PNG may declare one palette entry transparent, without an alpha channel."""
    image = Image.frombytes("P", (3, 2), PATTERN.astype(np.uint8).tobytes())
    image.putpalette([255, 255, 255, 255, 0, 0])
    image.save(tmp_path / "mask.png", transparency=0)
    with Image.open(tmp_path / "mask.png") as opened:
        assert opened.mode == "P"
        assert torch.equal(prepare_mask(opened), EXPECTED)
