"""Photos: what is read and what is refused; how they lie on what a model makes; where two differ; blended seams."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import fisedit_compile as fisedit
from fisedit_compile.errors import MaskError, OptionError, PipelineError
from fisedit_compile.pipelines.masks.blending import blended, check_seam
from fisedit_compile.pipelines.masks.placing import Placing, fitted_size
from fisedit_compile.pipelines.photos import MOST_PIXELS, check_photo_size, read_photo
from fisedit_compile.runtime import Domain
from fisedit_compile.runtime.masks import reduce_mask

HEIGHT, WIDTH = 20, 33
BYTES = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PHOTO = Image.fromarray(BYTES)


def back(photo: Any) -> np.ndarray:
    """The bytes that come back."""
    return (photo.pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def test_every_byte_comes_back() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(back(read_photo(every)), every)


FLOATS = BYTES.astype(np.float64) / 255


@pytest.mark.parametrize(
    "same",
    [
        PHOTO,
        BYTES,
        BYTES[None],
        BYTES.transpose(2, 0, 1),
        FLOATS,
        FLOATS.astype(">f8"),
        torch.from_numpy(BYTES).permute(2, 0, 1),
        torch.from_numpy(BYTES),
        torch.from_numpy(FLOATS).permute(2, 0, 1)[None].requires_grad_(),
        Image.merge("RGBA", [*PHOTO.split(), Image.new("L", PHOTO.size, 255)]),
    ],
    ids=lambda one: f"{type(one).__name__} {getattr(one, 'shape', getattr(one, 'mode', ''))}",
)
def test_forms_of_one_photo(same: Any) -> None:
    photo = read_photo(same)
    assert photo.size == (HEIGHT, WIDTH) and photo.opaque is None and photo.notes == ()
    assert photo.pixels.dtype == torch.float32 and np.array_equal(back(photo), BYTES)


def test_files_are_upright_and_their_own_bytes(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "photo.png")
    assert np.array_equal(back(read_photo(tmp_path / "photo.png")), BYTES)
    assert np.array_equal(back(read_photo(str(tmp_path / "photo.png"))), BYTES)
    tag = Image.Exif()
    tag[0x0112] = 6
    PHOTO.save(tmp_path / "turned.jpg", exif=tag, quality=95)
    with Image.open(tmp_path / "turned.jpg") as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))
    assert upright.shape[:2] == (WIDTH, HEIGHT)
    assert np.array_equal(back(read_photo(tmp_path / "turned.jpg")), upright)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_are_brought_to_colours(mode: str) -> None:
    photo = read_photo(PHOTO.convert(mode))
    assert np.array_equal(back(photo), np.asarray(PHOTO.convert(mode).convert("RGB")))
    assert bool(photo.notes) == (mode in ("CMYK", "YCbCr"))
    assert np.array_equal(back(read_photo(BYTES[..., 0])), BYTES[..., :1].repeat(3, axis=2))


@pytest.mark.parametrize("as_array", [False, True])
def test_transparent_photos_are_laid_over_white_and_it_is_said(as_array: bool) -> None:
    alpha = np.full((HEIGHT, WIDTH, 1), 255, dtype=np.uint8)
    alpha[:5], alpha[5:9] = 0, 51
    layer = np.concatenate([BYTES, alpha], axis=2)
    photo = read_photo(layer if as_array else Image.fromarray(layer)).over_white()
    expected = 255 + alpha / 255 * (BYTES.astype(float) - 255)
    assert np.abs(back(photo) - expected).max() <= 0.5001 and np.array_equal(back(photo)[9:], BYTES[9:])
    assert "white" in photo.notes[0] and photo.opaque is None
    keyed = Image.fromarray(np.zeros((16, 16), dtype=np.uint8))
    keyed.info["transparency"] = 0
    assert (back(read_photo(keyed).over_white()) == 255).all()


def animated() -> Image.Image:
    file = io.BytesIO()
    PHOTO.save(file, "GIF", save_all=True, append_images=[ImageOps.invert(PHOTO)])
    return Image.open(file)


def deep() -> Image.Image:
    """Colours of 16 bits, which Pillow opens as colours of 8."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), dtype=np.uint16)).save(file, "PNG")
    return Image.open(file)


@pytest.mark.parametrize(
    ("photo", "told"),
    [
        (animated, "2 pictures .an animation"),
        (deep, "8 bits"),
        (lambda: Image.new("I", (16, 16)), "8 bits"),
        (lambda: Image.new("F", (16, 16)), "8 bits"),
        (lambda: np.zeros((16, 16, 3), dtype=np.uint16), "floats from 0 to 1"),
        (lambda: torch.zeros(3, 16, 16, dtype=torch.int32), "floats from 0 to 1"),
        (lambda: np.zeros((16, 16, 3), dtype=bool), "array"),
        (lambda: np.zeros((16, 16, 3), dtype=complex), "array"),
        (lambda: torch.zeros(3, 16, 16, dtype=torch.complex64), "real part"),
        (lambda: np.full((16, 16, 3), np.nan), "nan"),
        (lambda: np.full((16, 16, 3), 255.0), "to 255"),
        (lambda: np.full((16, 16, 3), -1.0), "from -1"),
        (lambda: np.zeros((16, 16, 2)), "three or four channels"),
        (lambda: np.zeros((2, 16, 16, 3)), "one picture"),
        (lambda: np.zeros((0, 16, 3)), "0x16 pixels"),
        (lambda: Image.new("RGB", (0, 16)), "16x0 pixels"),
        (lambda: "no such file.png", "no file"),
        (lambda: ".", "folder"),
        (lambda: 3, "got int"),
    ],
)
def test_what_is_refused(photo: Any, told: str) -> None:
    with pytest.raises(PipelineError, match=told):
        read_photo(photo())


def test_files_that_are_none_or_cut_off_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    PHOTO.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    for name in ("text.png", "half.png"):
        with pytest.raises(PipelineError, match="cannot be decoded"):
            read_photo(tmp_path / name)


def test_colours_of_sixteen_bits_are_told_by_how_they_are_stored(tmp_path: Path) -> None:
    """Pillow writes no such file, and opens it as one of 8 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress((b"\0" + bytes(range(96))) * 16))
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""))
    assert Image.open(path).mode == "RGB"
    with pytest.raises(PipelineError, match="more than 8 bits"):
        read_photo(path)


class Huge(Image.Image):
    """A picture of which only the size may be looked at."""

    size = (MOST_PIXELS // 1000, 1001)
    width, height = size
    mode = "RGB"

    def load(self) -> Any:
        raise AssertionError("decoded")


def test_absurd_sizes_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(PipelineError, match="at most 67 million"):
        read_photo(Huge())
    for size, told in (((15, 40), "at least 16"), ((16, 129), "at most 8 times"), ((1, 10000), "at least 16")):
        with pytest.raises(PipelineError, match=told):
            check_photo_size(read_photo(np.zeros((*size, 3), dtype=np.uint8)))
    check_photo_size(read_photo(np.zeros((16, 128, 3), dtype=np.uint8)))


@given(
    st.tuples(st.integers(16, 5000), st.integers(16, 5000)).filter(lambda size: max(size) <= 8 * min(size)),
    st.sampled_from([8, 16, 64]),
    st.sampled_from([512, 1024]),
)
def test_fitted_sizes(picture: tuple[int, int], grid: int, side: int) -> None:
    height, width = fitted_size(picture, side**2, grid)
    assert height % grid == 0 and width % grid == 0
    assert 0.5 <= height * width / side**2 <= 1.5
    assert 0.75 <= height * picture[1] / (width * picture[0]) <= 1 / 0.75
    # What is left as it is fits as it is.
    assert fitted_size((height, width), side**2, grid) == (height, width)


def test_fitted_sizes_of_usual_photos() -> None:
    assert fitted_size((512, 768), 512**2, 64) == (512, 768)
    assert fitted_size((3000, 4000), 512**2, 64) == (448, 576)
    assert fitted_size((3000, 4000), 1024**2, 16) == (880, 1168)
    assert fitted_size((100, 100), 512**2, 64) == (512, 512)


@given(st.integers(16, 90), st.integers(16, 90), st.data())
def test_pixels_belong_to_cells_and_masks_to_pixels(height: int, width: int, data: st.DataObject) -> None:
    placing = Placing((height, width), (24, 40))
    cells = torch.from_numpy(np.random.default_rng(data.draw(st.integers(0, 99))).random((1, 12, 20)) < 0.3)
    region = placing.region(cells)
    assert region.shape == (1, height, width)
    # Each pixel has the cell in which its centre lies.
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    cell = cells[0, int((row + 0.5) * 12 / height), int((column + 0.5) * 20 / width)]
    assert region[0, row, column] == cell
    # What a user paints lies in the cells that it makes active.
    painted = torch.zeros(height, width, dtype=torch.bool)
    painted[row, column] = True
    given_region = placing.given_region(painted, 0.5, cells)
    assert torch.equal(given_region[0], painted)
    assert bool(placing.region(reduce_mask(given_region, Domain(12, 20)))[0, row, column])


def test_masks_of_photos_have_their_aspect_ratio_or_the_models() -> None:
    placing, cells = Placing((300, 400), (448, 576)), torch.ones(1, 56, 72, dtype=torch.bool)
    for size in ((300, 400), (30, 40), (1200, 1600), (56, 72), (448, 576)):
        assert placing.given_region(torch.ones(size), 0.5, cells).all()
    with pytest.raises(MaskError, match="aspect ratio"):
        placing.given_region(torch.ones(400, 300), 0.5, cells)
    with pytest.raises(MaskError, match="one mask"):
        placing.given_region(torch.ones(2, 300, 400), 0.5, cells)


def test_difference_masks() -> None:
    painted = PHOTO.copy()
    painted.paste((0, 0, 0), (4, 3, 9, 8))
    expected = (np.asarray(painted).astype(int) != BYTES).any(axis=2)
    exact = fisedit.difference_mask(PHOTO, painted, threshold=0)
    assert exact.dtype == bool and np.array_equal(exact, expected)
    # By how much, and not by how little.
    slightly = BYTES.clip(0, 200)
    for apart in (8, 9):
        mask = fisedit.difference_mask(slightly, slightly + np.uint8(apart))
        assert mask.all() == (apart > 8) and mask.any() == (apart > 8)
    grown = fisedit.difference_mask(BYTES, np.asarray(painted), threshold=0, grow=2)
    assert grown[1, 2] and not grown[0].any() and grown[1:10, 2:11].all() and grown.sum() == 81
    layer = Image.new("RGBA", PHOTO.size, (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (4, 3, 9, 8))
    assert np.array_equal(fisedit.difference_mask(PHOTO, layer, threshold=0), expected)
    batch = np.stack([BYTES, np.asarray(painted)])
    assert np.array_equal(
        fisedit.difference_mask(np.stack([BYTES, BYTES]), batch, threshold=0), np.stack([expected & False, expected])
    )


def test_what_difference_masks_refuse(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="20x33 and 33x20"):
        fisedit.difference_mask(PHOTO, PHOTO.transpose(Image.Transpose.ROTATE_90))
    with pytest.raises(MaskError, match="2 pictures before and 1 after"):
        fisedit.difference_mask(np.stack([BYTES, BYTES]), BYTES)
    with pytest.raises(PipelineError, match="the picture after"):
        fisedit.difference_mask(PHOTO, tmp_path / "missing.png")
    for wrong in ({"threshold": 1}, {"threshold": -0.1}, {"grow": -1}, {"grow": 0.5}):
        with pytest.raises(OptionError):
            fisedit.difference_mask(PHOTO, PHOTO, **wrong)


@given(st.integers(0, 6), st.integers(0, 99))
def test_seams_are_blended_inside_only(seam: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    region = torch.from_numpy(generator.random((1, 9, 12)) < 0.2)
    region[0, 2:8, 3:10] = True
    edited, base = (torch.from_numpy(generator.random((1, 3, 9, 12), dtype=np.float32)) for _ in range(2))
    result, steps = blended(edited, base, region, seam)
    inside = region.unsqueeze(1).expand_as(base)
    assert torch.equal(result[~inside], base[~inside])
    assert (result >= torch.minimum(edited, base) - 1e-6).all()
    assert (result <= torch.maximum(edited, base) + 1e-6).all()
    # The innermost pixels are the edit's, and without a seam all are.
    assert torch.equal(result[:, :, 5, 6], edited[:, :, 5, 6]) or seam >= 3
    assert seam or torch.equal(result[inside], edited[inside])
    assert steps is not None and 0 <= steps.mean <= steps.greatest


def test_a_seam_rises_evenly_and_a_border_is_none() -> None:
    region = torch.zeros(1, 8, 9, dtype=torch.bool)
    region[0, :, 3:] = True
    result, steps = blended(torch.ones(1, 1, 8, 9), torch.zeros(1, 1, 8, 9), region, 3)
    assert torch.allclose(result[0, 0], torch.tensor([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]).expand(8, 9))
    assert steps is not None and steps.greatest == pytest.approx(0.25)
    # A line of a single pixel is the edit's own.
    region = torch.zeros(1, 8, 9, dtype=torch.bool)
    region[0, 4] = True
    assert blended(torch.ones(1, 1, 8, 9), torch.zeros(1, 1, 8, 9), region, 3)[0][0, 0, 4].eq(1).all()
    everything, none = blended(torch.ones(1, 1, 8, 9), torch.zeros(1, 1, 8, 9), torch.ones_like(region), 3)
    assert everything.eq(1).all() and none is None
    for wrong in (-1, 0.5, True, "2"):
        with pytest.raises(OptionError, match="seam"):
            check_seam(wrong)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 64, 64).to_sparse(), torch.zeros(3, 64, 64, device="meta")], ids=["sparse", "meta"]
)
def test_tensors_without_values_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(PipelineError, match="sparse or has no values"):
        read_photo(tensor)


def test_a_file_of_too_many_pixels_is_to_be_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PipelineError, match="Make it smaller"):
        read_photo(tmp_path / "large.png")
