"""Masks: what is accepted, what is refused, and how a mask reaches another resolution or batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fisedit_compile.errors import FisEditError, MaskError
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


def test_small_and_negative_values() -> None:
    mask = torch.tensor([[1e-6, -1.0, 0.0, float("inf")]])
    assert prepare_mask(mask).tolist() == [[[True, False, False, True]]]


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
        torch.zeros(1, 1, 3, 3),
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
