"""``fisedit demo``: three edits with the model that comes with the package, each beside its dense twin."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisedit_compile.cli import options

if TYPE_CHECKING:
    from PIL import Image

    from fisedit_compile.cli.demo_results import DemoEdit
    from fisedit_compile.pipelines import EditSession, Picture

BASE_PROMPT = "a red ball in the middle, on the grass, by day"
FIREWORKS_PROMPT = "a red ball in the middle, on the grass, by day, with fireworks"
SWAP_PROMPT = "a blue house in the middle, on the grass, by day"
PHOTO_PROMPT = "a yellow house on the left, on the sand, at sunset"
PHOTO_EDIT_PROMPT = "a blue house on the left, on the sand, at sunset"

RUNS = 8
"""Runs of the network: a generation, two edits with their twins, an opening, its edit and the twin of that."""

BRUSH = (40 / 128, 60 / 128, 90 / 128, 112 / 128)
"""Left, top, right, bottom of the ellipse painted over the ball, in shares of the picture's width and height."""


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("fisedit-demo"),
    seed: options.Seed = 3,
    steps: options.Steps = 50,
    scheduler: options.Scheduler = None,
    device: options.Device = None,
) -> None:
    """Show three edits with the model that comes with the package; needs no network, and one to two minutes.

    A picture is generated: fireworks are added by words alone, and its ball becomes a house with a painted mask. Then a
    photo is opened (a drawn picture stands for it) and edited by words alone. Each edit is also made densely.

    Writes base.png; for the first edit mask.png (the mask over the base), edited.png and dense.png (the same edit made
    densely), for the second the same with -2; photo.png, and for its edit the same with -3; and sheet.png with all of
    them side by side.
    """
    output.mkdir(parents=True, exist_ok=True)
    pipe = options.load_model(options.EMBEDDED, scheduler, device, options.Precision.FLOAT32)
    from fisedit_compile.cli import demo_results
    from fisedit_compile.pipelines import EditSession

    arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": options.EMBEDDED_GUIDANCE}
    runs = _Runs(EditSession(pipe), pipe, seed, arguments)
    base = runs.generate()
    base.image.save(output / "base.png")
    edits = [
        runs.edit(base, "by words", 2, FIREWORKS_PROMPT, None),
        runs.edit(base, "painted", 4, SWAP_PROMPT, painted_mask(base.image.size)),
    ]
    photo = output / "photo.png"
    draw_photo(base.image.size, seed).save(photo)
    opened = runs.open(photo)
    edits.append(runs.edit_photo(opened))
    demo_results.write(output, edits)
    demo_results.show(output, base, opened, edits)


def painted_mask(size: tuple[int, int]) -> Image.Image:
    """What a person with a brush would paint over the ball; ``size`` is width and height in pixels."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", size, 0)
    width, height = size
    left, top, right, bottom = BRUSH
    ImageDraw.Draw(mask).ellipse((left * width, top * height, right * width, bottom * height), fill=255)
    return mask


def draw_photo(size: tuple[int, int], seed: int) -> Image.Image:
    """The drawn picture that stands for a photo; ``size`` is width and height in pixels."""
    from PIL import Image

    from fisedit_compile.scenes import parse_caption, render

    drawn = Image.fromarray(render(parse_caption(PHOTO_PROMPT), seed, size=max(size)))
    return drawn if drawn.size == size else drawn.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Runs:
    """The demo's runs, all with one pipeline and one seed; each shows a progress bar.

    Attributes:
        session: of the pipeline.
        pipe: the pipeline.
        seed: of the noise.
        arguments: of the pipeline, beside prompt and noise.
    """

    session: EditSession
    pipe: Any
    seed: int
    arguments: dict[str, Any]

    def generate(self) -> Picture:
        """Generate and record the picture."""
        self._name(1, "generating and recording")
        return self.session.generate(BASE_PROMPT, generator=self._noise(), **self.arguments)

    def edit(self, base: Picture, title: str, number: int, prompt: str, mask: Image.Image | None) -> DemoEdit:
        """An edit of the generated picture, and its dense twin: the plain pipeline, the new prompt, the same noise.

        Args:
            base: the picture.
            title: of the edit.
            number: of the edit among all runs; the twin is the next one.
            prompt: the new one.
            mask: None: it is found.
        """
        from fisedit_compile.cli.demo_results import DemoEdit

        self._name(number, f"editing, {title}")
        picture = self.session.edit(prompt, mask=mask, keep=False)
        self._name(number + 1, "the same edit, dense")
        started = time.perf_counter()
        dense = self.pipe(prompt, generator=self._noise(), **self.arguments).images[0]
        return DemoEdit(title, base, picture, dense, time.perf_counter() - started)

    def open(self, photo: Path) -> Picture:
        """Open the photo."""
        self._name(6, "opening the photo")
        return self.session.open(photo, PHOTO_PROMPT, generator=self._noise(), **self.arguments)

    def edit_photo(self, opened: Picture) -> DemoEdit:
        """The edit of the photo, and its dense twin.

        The plain pipeline cannot open a photo, so the twin is made by the session with a mask of everything, which has
        every step run densely, and pasted into the photo with the mask of the edit.
        """
        from PIL import Image

        from fisedit_compile.cli.demo_results import DemoEdit
        from fisedit_compile.cli.pictures import mask_of

        self._name(7, "editing the photo")
        picture = self.session.edit(PHOTO_EDIT_PROMPT, keep=False)
        self._name(8, "the same edit, dense")
        whole = self.session.edit(PHOTO_EDIT_PROMPT, mask=Image.new("L", opened.image.size, 255), keep=False)
        dense = Image.composite(whole.image, opened.image, mask_of(picture))
        return DemoEdit("photo", opened, picture, dense, whole.report.seconds["total"])

    def _name(self, number: int, what: str) -> None:
        """Say on the progress bar which run it is."""
        self.pipe.set_progress_bar_config(desc=f"{number} of {RUNS}: {what}")

    def _noise(self) -> Any:
        import torch

        return torch.Generator().manual_seed(self.seed)
