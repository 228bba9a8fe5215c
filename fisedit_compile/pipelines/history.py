"""The history of a session: its pictures with what edits of them need, changed by one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.decoding.autoencoder import EncodeMemory
from fisedit_compile.pipelines.decoding.decoding import DecodeRecord
from fisedit_compile.pipelines.masks.placing import Placing
from fisedit_compile.pipelines.network_state import NetworkState
from fisedit_compile.pipelines.noise import NoiseSource
from fisedit_compile.pipelines.picture import Picture
from fisedit_compile.pipelines.probing.probes import Floor
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.steps import Trajectory
from fisedit_compile.runtime import Runtime

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class OpenedPhoto:
    """What an edit needs of a photo with which a history begins.

    Attributes:
        placing: of the photo on what the model makes.
        decoded: the picture as the model makes it, ``[1, 3, *placing.model]``: the photo decoded from its latents, with
            the edits since.
        noise: of the photo's latents, in float32.
    """

    placing: Placing
    decoded: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Entry:
    """A picture of the history and what an edit of it needs.

    Attributes:
        picture: as it was returned.
        trajectory: of its run.
        arguments: of the pipeline call, without the generator.
        noise, numbers: what the run drew that the history began with, by its generators and altogether.
        scheduler: its class and settings.
        network: what the network was.
        dense_seconds: total of the dense run the history began with, without its set-up.
        decode: what its decode left for edits; None: it had none.
        encodes: what the generation's input pictures became.
        floor: of scores of probes, for the history.
        photo: that the history began with; None: it began with a generation.
    """

    picture: Picture
    trajectory: Trajectory
    arguments: dict[str, Any]
    noise: NoiseSource
    numbers: RandomNumbers
    scheduler: tuple[str, dict[str, Any]]
    network: NetworkState
    dense_seconds: float
    decode: DecodeRecord | None
    encodes: EncodeMemory
    floor: Floor
    photo: OpenedPhoto | None = None

    @property
    def placing(self) -> Placing | None:
        """Of the photo on what the model makes; None: the model made the picture."""
        return None if self.photo is None else self.photo.placing

    @property
    def decoded(self) -> Tensor | None:
        """The picture as the model makes it, ``[B, 3, height, width]``; None: latents were wanted."""
        return self.picture.pixels if self.photo is None else self.photo.decoded


class History:
    """The picture that a session began with and every edit since, with their recorded runs.

    Args:
        runtimes: that hold recorded runs, under the names of pictures.
    """

    def __init__(self, *runtimes: Runtime) -> None:
        self._runtimes = runtimes
        self._entries: list[Entry] = []
        self._named = 0

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All of them, oldest first."""
        return tuple(entry.picture for entry in self._entries)

    @property
    def last(self) -> Entry:
        """What the next edit starts from.

        Raises:
            PipelineError: there is nothing yet.
        """
        if not self._entries:
            raise PipelineError("there is no picture to edit yet; call generate or open first")
        return self._entries[-1]

    def new_name(self, kind: str) -> str:
        """A name for the next picture, such as ``edit-3``."""
        self._named += 1
        return f"{kind}-{self._named}"

    def add(self, entry: Entry) -> None:
        """The picture that the next edit starts from."""
        self._entries.append(entry)

    def begin(self, entry: Entry) -> None:
        """Forget everything and begin with a picture."""
        self.reset()
        self.add(entry)

    def undo(self) -> None:
        """Drop the last edit and its recorded run.

        Raises:
            PipelineError: there is no edit.
        """
        if len(self._entries) < 2:
            raise PipelineError("there is no edit to undo; the history holds no edit that was kept")
        self.drop(self._entries.pop().picture.name)

    def reset(self) -> None:
        """Forget everything and free the recorded runs."""
        while self._entries:
            self.drop(self._entries.pop().picture.name)

    def drop(self, name: str) -> None:
        """Free the recorded runs of a picture, as far as there are any."""
        for runtime in self._runtimes:
            if name in runtime.bases:
                runtime.drop(name)


class Turn:
    """What one thread at a time has, and cannot take again: a callback of a run cannot change the history that the run
    works with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        """Wait for it.

        Raises:
            PipelineError: this thread has it already.
        """
        if self._owner == threading.get_ident():
            raise PipelineError(
                "this session is at work: a callback of its run cannot generate, open, edit, find masks, undo or reset "
                "with it; do so when the run has ended, or with another session"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *raised: object) -> None:
        """Give it back."""
        self._owner = None
        self._lock.release()


def taking_turns(method: Method) -> Method:
    """Let one thread at a time into the methods of a session that change its history: into those that take its
    ``turn``."""

    @wraps(method)
    def alone(session: Any, *positional: Any, **named: Any) -> Any:
        with session.turn:
            return method(session, *positional, **named)

    return cast(Method, alone)
