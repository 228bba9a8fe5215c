"""What a method is given: the networks, the edit, and the picture that it edits."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fisedit_compile import __version__
from fisedit_compile.bench.quality.cases import EditCase
from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import EditSession
from fisedit_compile.scenes.regions import asked_region

LEVELS_APART = 2
"""By how many of 255 levels a base that is made again may differ: which way of computing is the fastest is measured in
each process, and they round differently."""


@dataclass
class DenseSteps:
    """What was computed densely, in steps of the plain pipeline."""

    count: float = 0.0


class Networks:
    """The model, in a pipeline for sessions and in one for all methods that compute densely.

    The second has a U-Net of its own with the same weights, whose calls are counted, and whose attention a method may
    exchange without any session's noticing.

    Args:
        pipe: a text-to-image pipeline of the scenes' world.
        steps: scheduler steps of every picture.
        guidance: scale of the guidance, above 1.

    Attributes:
        side: width and height of the pictures in pixels.
        arguments: of every call of a pipeline.
    """

    def __init__(self, pipe: Any, steps: int, guidance: float) -> None:
        self.pipe = pipe
        self.arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
        self.side: int = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.unet = copy.deepcopy(pipe.unet)
        self.plain = self.pipeline(type(pipe))
        self._counted: DenseSteps | None = None
        self._sessions: dict[str, EditSession] = {}
        self.unet.register_forward_pre_hook(self._count, with_kwargs=True)

    def pipeline(self, kind: Any, **parts: Any) -> Any:
        """A pipeline of another class with the counted U-Net, a scheduler of its own, and the model's other parts."""
        own: dict[str, Any] = {"unet": self.unet, "scheduler": copy.deepcopy(self.pipe.scheduler)}
        known = inspect.signature(kind.__init__).parameters
        shared = {name: part for name, part in self.pipe.components.items() if name in known}
        made = kind(**{**shared, **own, **parts}, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    def session(self, **options: Any) -> tuple[str, EditSession]:
        """A session with some options and the name of these options; those of one name are the same session."""
        name = repr(sorted(options.items()))
        if name not in self._sessions:
            self.pipe.set_progress_bar_config(disable=True)
            self._sessions[name] = EditSession(self.pipe, **options)
        return name, self._sessions[name]

    def release(self) -> None:
        """Free what the sessions recorded."""
        for session in self._sessions.values():
            session.reset()

    def identity(self) -> dict[str, Any]:
        """What tells this model and its settings from others, as plain values for JSON."""
        digest = hashlib.sha256()
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            digest.update(_text(part.config if isinstance(part.config, Mapping) else part.config.to_dict()))
            for name, value in part.state_dict().items():
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {
            "package": __version__,
            "model": digest.hexdigest(),
            "side": self.side,
            "type": str(self.pipe.unet.dtype),
            "device": str(self.pipe.device),
            "threads": torch.get_num_threads(),
            "scheduler": hashlib.sha256(_text(self.pipe.scheduler.config)).hexdigest(),
            "steps": self.arguments["num_inference_steps"],
            "guidance": self.arguments["guidance_scale"],
        }

    @contextmanager
    def counting(self) -> Iterator[DenseSteps]:
        """Count what the U-Net of the plain pipelines computes."""
        self._counted = found = DenseSteps()
        try:
            yield found
        finally:
            self._counted = None

    def _count(self, module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._counted is not None:
            sample = named["sample"] if "sample" in named else given[0]
            cells = self.pipe.unet.config.sample_size**2
            self._counted.count += sample.shape[0] / 2 * sample.shape[2] * sample.shape[3] / cells


class Task:
    """One edit that methods make.

    Args:
        networks: that they make it with.
        case: the edit.
        base: the picture before it, if it was made earlier; None: to be made when asked for.
        dense: the dense edit, if it was made earlier.
        steps: scheduler steps; None: those of the networks' settings.

    Attributes:
        networks, case: as given.
        arguments: of every call of a pipeline.
        dense: the dense edit; None until it is made, before every other method's.
    """

    def __init__(
        self,
        networks: Networks,
        case: EditCase,
        base: Image.Image | None = None,
        dense: Image.Image | None = None,
        steps: int | None = None,
    ) -> None:
        self.networks, self.case, self.dense = networks, case, dense
        self.arguments = {**networks.arguments, **({} if steps is None else {"num_inference_steps": steps})}
        self._base = base
        self._prepared: set[str] = set()

    def noise(self) -> torch.Generator:
        """The source of the noise, from its start."""
        return torch.Generator().manual_seed(self.case.seed)

    @property
    def base(self) -> Image.Image:
        """The picture before the edit."""
        if self._base is None:
            self.session()
        assert self._base is not None
        return self._base

    @cached_property
    def region(self) -> NDArray[np.bool_]:
        """What the edit asks for, bool ``[side, side]``.

        Raises:
            PipelineError: the dense edit is not made yet.
        """
        if self.dense is None:
            raise PipelineError(f"the asked-for region of {self.case.name} needs the dense edit, which is not made yet")
        return asked_region(self.case.kind, self.base, self.dense)

    def session(self, **options: Any) -> EditSession:
        """A session that has generated the picture before the edit.

        Args:
            **options: of the session.

        Raises:
            PipelineError: the picture is another one than before.
        """
        name, session = self.networks.session(**options)
        if name not in self._prepared:
            picture = session.generate(self.case.prompt, generator=self.noise(), **self.arguments).image
            self._prepared.add(name)
            if self._base is None:
                self._base = picture
            apart = np.abs(np.asarray(picture, dtype=np.int16) - np.asarray(self._base, dtype=np.int16)).max()
            if apart > LEVELS_APART:
                raise PipelineError(
                    f"the base of {self.case.name} differs from the one made before by {apart} of 255 levels, where "
                    f"{LEVELS_APART} are expected at most; evaluate in a new folder"
                )
        return session


def _text(config: Mapping[str, Any]) -> bytes:
    """A configuration without what libraries note in it: where it was loaded from, by which version."""
    own = {name: value for name, value in config.items() if not name.startswith("_") and "version" not in name}
    return json.dumps(own, sort_keys=True, default=str).encode()
