"""What is kept of an evaluation: every finished picture, and one line of numbers for it.

    settings.json               the model and the settings, to which all of it belongs
    results.jsonl               one line for each finished edit of a row
    pictures/CASE/base.png      the picture before the edit
    pictures/CASE/ROW.png       the picture that a row made of it
    pictures/CASE/ROW-mask.png  where the row may have changed something

A picture is written before its line.  Whatever a run that was killed left half done is made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fisedit_compile.bench.quality.cases import EditCase
from fisedit_compile.bench.quality.measures import Measures, Outcome
from fisedit_compile.errors import OptionError

FORMAT = 1
"""Of the folder; another one is refused."""

_SETTINGS, _RESULTS, _PICTURES = "settings.json", "results.jsonl", "pictures"


class ResultFolder:
    """The folder of an evaluation, new or begun.

    Args:
        path: of the folder; it is made where there is none.
        identity: what tells the model and the settings from others, as plain values.

    Raises:
        OptionError: the folder belongs to other settings, holds something else, or its lines cannot be read.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._take_possession({"format": FORMAT, **identity})
        self._finished = self._read()

    def _take_possession(self, identity: dict[str, Any]) -> None:
        """Write the settings into a new folder, or compare them with those of one that was begun."""
        settings = self.path / _SETTINGS
        if self.path.exists() and not self.path.is_dir():
            raise OptionError(f"expected a folder, and {self.path} is a file; choose another --output")
        if not settings.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise OptionError(f"{self.path} holds files, but no evaluation ({_SETTINGS}); choose another --output")
            self.path.mkdir(parents=True, exist_ok=True)
            _write(settings, (json.dumps(identity, indent=2) + "\n").encode())
            return
        try:
            found = json.loads(settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OptionError(f"{settings} cannot be read ({error}); choose another --output") from error
        other = [name for name in identity if not isinstance(found, dict) or found.get(name) != identity[name]]
        if other:
            before = found if isinstance(found, dict) else {}
            told = "; ".join(
                f"{name}: {_short(before.get(name))} there, {_short(identity[name])} now" for name in other
            )
            raise OptionError(f"{self.path} has results of other settings ({told}); choose another --output")

    def _read(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The lines by case and row; a last one that was not written to its end is taken away."""
        path = self.path / _RESULTS
        if not path.exists():
            return {}
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            _write(path, whole)
        found = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
                Measures.from_dict(values)
                found[values["case"], values["row"]] = values
            except (ValueError, KeyError, TypeError) as error:
                raise OptionError(
                    f"line {number} of {path} is no result ({error!r}); remove it, or choose another --output"
                ) from error
        return found

    def find(self, case: EditCase, row: str) -> Measures | None:
        """The numbers of a finished edit whose picture is there; None for one that is to be made.

        Raises:
            OptionError: the case was another edit when it was finished.
        """
        values = self._finished.get((case.name, row))
        if values is None or not self._path(case, row).exists():
            return None
        for name, value in _edit_of(case).items():
            if values.get(name) != value:
                raise OptionError(
                    f"{self.path} has another edit as {case.name} ({name}: {values.get(name)!r} there, {value!r} now); "
                    "choose another --output"
                )
        return Measures.from_dict(values)

    def add(self, case: EditCase, row: str, outcome: Outcome, measures: Measures) -> None:
        """Keep a finished edit."""
        self._save(case, row, outcome.picture)
        if outcome.mask is not None:
            self._save(case, f"{row}-mask", Image.fromarray(outcome.mask.astype(np.uint8) * 255))
        values = {"case": case.name, "row": row, **_edit_of(case), **measures.to_dict()}
        with (self.path / _RESULTS).open("ab") as file:
            file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._finished[case.name, row] = values

    def save_base(self, case: EditCase, picture: Image.Image) -> None:
        """Keep the picture before the edit, unless it is kept already."""
        if not self._path(case, "base").exists():
            self._save(case, "base", picture)

    def picture(self, case: EditCase, name: str) -> Image.Image | None:
        """A kept picture: ``base``, or that of a row; None where there is none."""
        path = self._path(case, name)
        if not path.exists():
            return None
        with Image.open(path) as picture:
            return picture.convert("RGB")

    def mask(self, case: EditCase, row: str) -> NDArray[np.bool_] | None:
        """The kept mask of a row, bool ``[side, side]``; None where there is none."""
        picture = self.picture(case, f"{row}-mask")
        return None if picture is None else np.asarray(picture.convert("L")) > 0

    def _path(self, case: EditCase, name: str) -> Path:
        return self.path / _PICTURES / case.name / f"{name}.png"

    def _save(self, case: EditCase, name: str, picture: Image.Image) -> None:
        path = self._path(case, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        picture.save(partial, format="PNG")
        os.replace(partial, path)


def _edit_of(case: EditCase) -> dict[str, Any]:
    """What tells an edit from another one of the same name."""
    return {"kind": case.kind, "prompt": case.prompt, "edited_prompt": case.edited_prompt, "seed": case.seed}


def _write(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or the new one, never half of it."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    os.replace(partial, path)


def _short(value: Any) -> str:
    """A value in an error's message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
