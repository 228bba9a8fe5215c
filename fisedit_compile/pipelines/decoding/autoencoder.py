"""The autoencoder of a session during one pipeline call: sparse decodes, and encodes that need no repetition."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from fisedit_compile.errors import WeightsChangedError
from fisedit_compile.pipelines.arguments import keep_value, same_value
from fisedit_compile.pipelines.decoding.decoding import DecodeJob, Decoding, SparseDecoder
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.steps import StepFollower
from fisedit_compile.pipelines.twin import module_view
from fisedit_compile.private.modules import original_module
from fisedit_compile.runtime.fingerprint import Weights


class EncodeMemory:
    """What the autoencoder made of the input pictures of a generation; its edits have the same pictures."""

    def __init__(self) -> None:
        self._network: Any = None
        self._weights: Weights | None = None
        self._known: list[tuple[Any, Any]] = []

    def note(self, vae: Any, given: Any, result: Any) -> None:
        """Remember what ``vae`` made of the arguments ``given``."""
        if self._network is None:
            self._network, self._weights = vae, Weights(list(vae.parameters()))
        if vae is self._network:
            self._known.append((keep_value(given), copy.deepcopy(result)))

    def find(self, vae: Any, given: Any) -> Any:
        """A copy of what ``vae`` made of these arguments; None when it is not known, or its weights are others now."""
        if vae is not self._network or self._weights is None:
            return None
        found = next((result for known, result in self._known if same_value(known, given)), None)
        if found is None:
            return None
        try:
            self._weights.verify(list(vae.parameters()), "of the encoder")
        except WeightsChangedError:
            return None
        return copy.deepcopy(found)


class AutoencoderCall:
    """What happens to the autoencoder in one pipeline call.

    Args:
        decoder: how to decode.
        job: the decode; its outcome is set when the pipeline decodes.
        encodes: of the generation.
        generation: whether encodes are remembered, not looked up.

    Attributes:
        encodes_reused: how many encodes needed no computation.
        decoded: what the decoder was given for the picture; None: nothing yet.
    """

    def __init__(self, decoder: SparseDecoder, job: DecodeJob, encodes: EncodeMemory, generation: bool) -> None:
        self.job = job
        self.encodes = encodes
        self._decoder = decoder
        self.encodes_reused = 0
        self.decoded: Tensor | None = None
        self._generation = generation

    @property
    def outcome(self) -> Decoding | None:
        """How the picture was decoded; None: it was not."""
        return self.job.outcome

    def view(self, vae: Any, follower: StepFollower, numbers: RandomNumbers) -> Any:
        """What stands for the autoencoder of a pipeline in this call and this thread; it has the same tensors.

        The decode of the picture is the first one behind the pipeline's loop. All others are the autoencoder's own, and
        those of another thread.

        Args:
            vae: the user's autoencoder.
            follower: tells when the loop is done.
            numbers: networks run without.
        """
        original = original_module(vae)
        thread = threading.get_ident()
        view = module_view(original)

        def is_ours() -> bool:
            return threading.get_ident() == thread

        # What the user has put in the place of a method may not look at the network that is exchanged.
        if "decode" not in vars(original) and getattr(original, "decoder", None) is not None:
            vars(view)["decode"] = self._decode(original, view, is_ours, follower, numbers)
        if "encode" not in vars(original) and callable(getattr(original, "encode", None)):
            vars(view)["encode"] = self._encode(original, is_ours, follower)
        return view

    def _decode(
        self, original: Any, view: Any, is_ours: Callable[[], bool], follower: StepFollower, numbers: RandomNumbers
    ) -> Any:
        # Of the view, whose decoder is exchanged.
        dense = view.decode

        @wraps(original.decode)
        def decode(latents: Tensor, *positional: Any, **named: Any) -> Any:
            if not is_ours() or not follower.finished or self.job.outcome is not None:
                return original.decode(latents, *positional, **named)
            self.decoded = latents
            if latents.dim() != 4:
                self.job.outcome = Decoding("dense", "autoencoders of videos, also of single pictures, run densely")
                return original.decode(latents, *positional, **named)
            # Graphs are made for strides: those of the latents must not depend on what the scheduler did.
            latents = latents.contiguous()
            with numbers.paused():
                return self._decoder.decode(view, self.job, lambda: dense(latents, *positional, **named))

        return decode

    def _encode(self, vae: Any, is_ours: Callable[[], bool], follower: StepFollower) -> Any:
        @wraps(vae.encode)
        def encode(*positional: Any, **named: Any) -> Any:
            if not is_ours():
                return vae.encode(*positional, **named)
            given = (*positional, sorted(named.items(), key=lambda item: item[0]))
            found = None if self._generation else self.encodes.find(vae, given)
            if found is not None:
                self.encodes_reused += 1
                return found
            result = vae.encode(*positional, **named)
            if self._generation:
                self.encodes.note(vae, given, result)
            else:
                follower.trajectory.calls.expect_other_inputs()
            return result

        return encode
