"""Masks as programs save them: files, modes, orientation, transparency."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from fisedit_compile.errors import MaskError
from fisedit_compile.runtime.masks import prepare_mask

HEIGHT, WIDTH = 24, 40
BOX = (slice(6, 15), slice(8, 27))
ORIENTATION = 0x0112


def box() -> np.ndarray:
    found = np.zeros((HEIGHT, WIDTH), bool)
    found[BOX] = True
    return found


def white_box() -> Image.Image:
    return Image.fromarray(box().astype(np.uint8) * 255)


def photo(seed: int = 0) -> Image.Image:
    """Smooth, in many colours, with dark and bright parts."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def with_alpha(picture: Image.Image, alpha: np.ndarray) -> Image.Image:
    result = picture.convert("RGBA")
    result.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return result


def same(mask: Any, expected: np.ndarray) -> bool:
    return torch.equal(prepare_mask(mask), torch.from_numpy(expected)[None])


def saved(picture: Image.Image, form: str, **settings: Any) -> Image.Image:
    """As it comes back from a file."""
    file = io.BytesIO()
    picture.save(file, form, **settings)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_black_and_white_in_every_format(form: str, mode: str, tmp_path: Path) -> None:
    picture = white_box().convert(mode)
    if form == "WEBP":
        picture = picture.convert("RGB")
    path = tmp_path / f"mask.{form.lower()}"
    picture.save(path, **({"lossless": True} if form == "WEBP" else {}))
    for given_path in (path, str(path)):
        assert same(given_path, box())
    assert same([path, Image.open(path)], box()) is False, "two masks"
    assert prepare_mask([path, Image.open(path)]).equal(torch.from_numpy(box()).repeat(2, 1, 1))


def test_sixteen_bits_and_print_colours(tmp_path: Path) -> None:
    Image.fromarray(box().astype(np.uint16) * 65535).save(tmp_path / "deep.png")
    white_box().convert("RGB").convert("CMYK").save(tmp_path / "print.tif")
    white_box().convert("LA").save(tmp_path / "opaque.png")
    for name in ("deep.png", "print.tif", "opaque.png"):
        assert same(tmp_path / name, box())
    faint = Image.fromarray(box().astype(np.uint16) * 255)
    assert not prepare_mask(faint).any(), "255 of 65535 is black"
    lab = Image.merge("LAB", (white_box(), Image.new("L", (WIDTH, HEIGHT), 128), Image.new("L", (WIDTH, HEIGHT), 128)))
    assert same(lab, box())


@pytest.mark.parametrize("quality", [10, 50, 95])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_does_not_spread(quality: int, mode: str) -> None:
    """Ringing goes around the edges, not over the picture."""
    found = prepare_mask(saved(white_box().convert(mode), "JPEG", quality=quality))[0].numpy()
    near = np.asarray(white_box().filter(ImageFilter.MaxFilter(5))) > 0
    inner = np.asarray(white_box().filter(ImageFilter.MinFilter(5))) > 0
    assert not found[~near].any() and found[inner].all()


def test_a_blurred_edge_and_a_faint_ground_keep_the_mask() -> None:
    blurred = white_box().filter(ImageFilter.GaussianBlur(2))
    assert 0.8 < float(prepare_mask(blurred).float().mean()) / box().mean() < 1.2
    ground = Image.fromarray(np.where(box(), 255, 1).astype(np.uint8))
    assert same(ground, box()) and same(ground.convert("RGB"), box())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_tag_is_followed(orientation: int, tmp_path: Path) -> None:
    lying = Image.fromarray(box().astype(np.uint8)[:, :30] * 255)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lying.save(tmp_path / "mask.jpg", exif=exif, quality=95)
    lying.save(tmp_path / "mask.png", exif=exif)
    turn = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose}
    turn |= {6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).T, 8: np.rot90}
    expected = np.ascontiguousarray(turn[orientation](box()[:, :30]))
    assert same(tmp_path / "mask.png", expected) and same(Image.open(tmp_path / "mask.png"), expected)
    jpeg = prepare_mask(tmp_path / "mask.jpg")[0].numpy()
    assert jpeg.shape == expected.shape and (jpeg != expected).mean() < 0.05


@given(st.integers(0, 9), st.sampled_from([0, 90, 255]))
def test_the_hole_of_a_photo_is_edited(seed: int, grey: int) -> None:
    """Whatever lies in it: programs keep the colours that were there, or make them black or white."""
    picture = photo(seed)
    if grey:
        picture.paste((grey, grey, grey), (8, 6, 27, 15))
    holed = with_alpha(picture, 255 * ~box())
    assert same(holed, box())
    assert same(np.asarray(holed), box()) and same(torch.from_numpy(np.array(holed)), box())
    assert same(saved(holed, "PNG"), box())


@pytest.mark.parametrize("colour", [(255, 255, 255), (200, 20, 30), (0, 90, 255), (128, 128, 128)])
@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("opacity", [255, 150])
def test_the_paint_of_a_layer_is_edited(
    colour: tuple[int, int, int], ground: tuple[int, int, int], opacity: int
) -> None:
    picture = Image.new("RGB", (WIDTH, HEIGHT), ground)
    picture.paste(colour, (8, 6, 27, 15))
    layer = with_alpha(picture, opacity * box())
    assert same(layer, box()) and same(layer.convert("RGBa"), box())
    assert same(saved(layer, "PNG"), box())


def test_soft_brushes_and_several_colours() -> None:
    soft = np.asarray(white_box().filter(ImageFilter.GaussianBlur(1)))
    layer = with_alpha(Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)), soft)
    assert same(layer, soft >= 128)
    mixed = Image.fromarray((np.asarray(layer) * (soft[..., None] / 255)).astype(np.uint8), "RGBA")
    mixed.putalpha(Image.fromarray(soft))
    assert same(mixed, soft >= 128), "colours multiplied by the opacity"
    two = Image.new("RGBA", (WIDTH, HEIGHT))
    ImageDraw.Draw(two).rectangle((8, 6, 16, 14), (255, 0, 0, 255))
    ImageDraw.Draw(two).rectangle((17, 6, 26, 14), (0, 255, 0, 255))
    assert same(two, box())


def test_a_transparent_colour_of_a_palette(tmp_path: Path) -> None:
    palette = Image.fromarray(box().astype(np.uint8), "L")
    palette = Image.frombytes("P", palette.size, palette.tobytes())
    palette.putpalette([10, 20, 30, 255, 0, 0])
    palette.save(tmp_path / "mask.png", transparency=0)
    palette.save(tmp_path / "mask.gif", transparency=0)
    white_box().save(tmp_path / "grey.png", transparency=0)
    Image.fromarray(box().astype(np.uint16) * 65535).save(tmp_path / "deep.png", transparency=0)
    white_box().convert("1").save(tmp_path / "one.png", transparency=0)
    for name in ("mask.png", "mask.gif", "grey.png", "deep.png", "one.png"):
        assert same(tmp_path / name, box()), name


def test_a_black_picture_with_a_hole_and_a_layer_without_paint() -> None:
    assert same(with_alpha(Image.new("RGB", (WIDTH, HEIGHT)), 255 * ~box()), box())
    assert not prepare_mask(Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0))).any()


@pytest.mark.parametrize(
    ("picture", "alpha", "told"),
    [
        (photo(), 255 * box(), "a photo of which most is cut away"),
        (Image.new("RGB", (WIDTH, HEIGHT)), 255 * box(), "black on a transparent ground"),
        (
            Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255)),
            255 * ~box(),
            "one colour or a few that fill most of the picture",
        ),
        (
            Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 20)),
            255 * ~box(),
            "one colour or a few that fill most of the picture",
        ),
        (white_box(), np.where(np.arange(WIDTH) < 30, 255, 0)[None].repeat(HEIGHT, 0), "black and white beside"),
    ],
)
def test_what_cannot_be_told_is_refused(picture: Image.Image, alpha: np.ndarray, told: str) -> None:
    with pytest.raises(MaskError, match=f"got {told}.*mask=alpha to edit what is opaque"):
        prepare_mask(with_alpha(picture, alpha))


def test_the_way_out_works() -> None:
    alpha = np.asarray(with_alpha(photo(), 255 * box()))[..., 3]
    assert same(alpha, box()) and same(255 - alpha, ~box())


def test_faint_paint_is_not_lost_without_a_word() -> None:
    layer = with_alpha(Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)), 90 * box())
    with pytest.raises(MaskError, match=r"the paint of the mask is at most 35% opaque\. Pass white_threshold=0\.18"):
        prepare_mask(layer)
    assert torch.equal(prepare_mask(layer, 0.18), torch.from_numpy(box())[None])
    with pytest.raises(MaskError, match="the hole of the mask is at most 35% transparent"):
        prepare_mask(with_alpha(photo(), 255 - 90 * box()))


def test_several_pictures_in_one_file(tmp_path: Path) -> None:
    frames = [white_box(), Image.new("L", (WIDTH, HEIGHT), 255)]
    for name in ("mask.gif", "mask.tiff", "mask.png", "mask.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True}))
        with pytest.raises(MaskError, match=r"holds 2 .*mask=picture\.copy\(\)"):
            prepare_mask(tmp_path / name)
    with Image.open(tmp_path / "mask.gif") as opened:
        assert same(opened.copy(), box())
        opened.seek(1)
        assert prepare_mask(opened).all()


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaskError, match=r"got 'mask\.png', and there is no such file in"):
        prepare_mask("mask.png")
    with pytest.raises(MaskError, match="a folder"):
        prepare_mask(tmp_path)
    Path("text.png").write_text("no picture")
    whole = io.BytesIO()
    photo().resize((400, 300)).save(whole, "PNG")
    Path("half.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    Path("empty.jpg").write_bytes(b"")
    for name in ("text.png", "half.png", "empty.jpg", "nul\0byte.png"):
        with pytest.raises(MaskError, match=r"(?s)can be decoded; got the file .*Save it as PNG"):
            prepare_mask(name)
    with pytest.raises(MaskError, match="can be decoded; got the mask"):
        prepare_mask(Image.open("half.png"))
    opened = Image.open("half.png")
    opened.close()
    with pytest.raises(MaskError, match="can be decoded; got the mask"):
        prepare_mask(opened)
    assert os.listdir(tmp_path), "nothing was removed"
