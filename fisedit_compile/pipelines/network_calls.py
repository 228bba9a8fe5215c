"""What the network of a run was called with, so that an edit whose calls would differ is refused in the user's words.

A recorded run and an edit are lined up call by call. The runtime finds out as well when they do not fit, but knows
graphs only; and where the prompt of an edit happens to be as long as the recorded negative prompt, it could take the
one for the other.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.runtime import Domain

SAME_START = 1e-3
"""Greatest difference of what the first call is given, as a share of the greatest value: encodes differ by rounding."""

Forms = dict[str, tuple[int, ...]]
"""The shapes of the tensors of a network call, by the names of its arguments."""


class NetworkCalls:
    """The network calls of a run, in order.

    Args:
        recorded: those of the picture that is edited; None for a generation.
        latents: what the network may call the latents that it is given; the first that is a tensor counts.
        tokens: what it calls them where they are tokens.
    """

    def __init__(
        self, recorded: NetworkCalls | None = None, latents: Sequence[str] = (), tokens: str | None = None
    ) -> None:
        self._recorded = recorded
        self._latents: tuple[str, ...] = tuple(latents) if recorded is None else recorded._latents
        self._tokens: str | None = tokens if recorded is None else recorded._tokens
        self._forms: list[Forms] = []
        self._ends: list[int] = []
        self._map: Domain | None = None
        self._start: tuple[str, Tensor] | None = None
        self._other_inputs = False

    @property
    def latents(self) -> tuple[str, ...]:
        """What the network may call the latents that it is given."""
        return self._latents

    def add(self, arguments: Mapping[str, Any]) -> None:
        """The network is about to be called with these arguments.

        Raises:
            PipelineError: the recorded run called it with other shapes, or less often.
        """
        forms = dict(_forms(arguments))
        number = len(self._forms)
        self._forms.append(forms)
        if not number:
            name = next((name for name in self._latents if isinstance(arguments.get(name), Tensor)), None)
            self._start = None if name is None else (name, arguments[name].detach().clone())
        if self._recorded is None:
            return
        if number >= len(self._recorded._forms):
            raise self._other_count(len(self._recorded._forms), number + 1, "the whole run")
        before = self._recorded._forms[number]
        for name in {**forms, **before}:
            if forms.get(name) != before.get(name):
                raise _difference(name, before.get(name), forms.get(name))
        if not number:
            self._check_start(self._recorded)

    @property
    def start(self) -> Tensor | None:
        """The latents that the first call was given; None: there was none, or they have another name."""
        return None if self._start is None else self._start[1]

    def _check_start(self, recorded: NetworkCalls) -> None:
        """Refuse an edit that starts from other noise: nothing else that comes to the first call depends on prompts."""
        if self._start is None or recorded._start is None or self._other_inputs:
            return
        now, before = self._start[1].float(), recorded._start[1].float()
        if float((now - before).abs().max()) > SAME_START * float(before.abs().max()):
            raise PipelineError(
                f"the network is first given other latents ({self._start[0]}) than when the picture was generated: the "
                "noise, or an input picture, comes from elsewhere than PyTorch's generators and the arguments; give a "
                "generator, or latents, to generate"
            )

    def expect_other_inputs(self) -> None:
        """The input pictures were encoded again, by an encoder with other weights, so the first call gets others."""
        self._other_inputs = True

    def expect_map(self, domain: Domain) -> None:
        """The pipeline has prepared latents of this size, and the network is to be called with maps of the same."""
        self._map = domain

    def check_map(self, pipe: Any) -> None:
        """Refuse a network that is called with parts of the picture: a mask of the picture would be laid over each.

        Args:
            pipe: the pipeline, for the message.

        Raises:
            PipelineError: the last call had a map of another size than the pipeline's latents.
        """
        forms = self._forms[-1] if self._forms else {}
        shape = next((forms[name] for name in self._latents if name in forms), ())
        if self._map is not None and len(shape) == 4 and Domain(*shape[-2:]) != self._map:
            raise PipelineError(
                f"{type(pipe).__name__} calls its network with maps of {Domain(*shape[-2:])} cells, and its latents "
                f"have {self._map}: it makes the picture from parts, over each of which a mask of the picture cannot "
                "be laid. Make a picture of the size of one part, or call the pipeline itself, without a session"
            )

    def shapes(self, name: str) -> list[tuple[int, ...] | None]:
        """The shape of an argument in each call; None where it was no tensor, or not given."""
        return [forms.get(name) for forms in self._forms]

    @property
    def one_a_turn(self) -> bool:
        """Whether each turn of the loop had one call."""
        return self._ends == list(range(1, len(self._forms) + 1))

    def end_turn(self) -> None:
        """A turn of the pipeline's loop is done.

        Raises:
            PipelineError: the recorded run made another number of calls until here.
        """
        turn = len(self._ends)
        self._ends.append(len(self._forms))
        if self._recorded is not None and turn < len(self._recorded._ends):
            expected = self._recorded._ends[turn]
            if expected != len(self._forms):
                raise self._other_count(expected, len(self._forms), f"the first {turn + 1} turns of the loop")

    def check_tokens(self, pipe: Any, sizes: Container[int]) -> None:
        """Refuse a network that takes tokens of other pictures behind those of the picture that is made: the mask would
        be laid over all of them as if they were one picture. Their number alone does not tell, because three pictures
        of one size behind the first have as many tokens as one of twice its height and width.

        Args:
            pipe: the pipeline, for the message.
            sizes: numbers of tokens that the picture may have.

        Raises:
            PipelineError: the last call had another number of tokens.
        """
        shape = self._forms[-1].get(self._tokens) if self._forms and self._tokens is not None else None
        if shape is not None and shape[1] not in sizes:
            raise PipelineError(
                f"{type(pipe).__name__} gives its network {shape[1]} tokens, which are not those of the picture alone: "
                "an edit session cannot edit a picture in the context of others, and must be told the size where the "
                "pipeline takes it from another picture. Generate without these others (image), give height and width "
                "that are the picture's, or call the pipeline itself, without a session"
            )

    @staticmethod
    def _other_count(expected: int, came: int, where: str) -> PipelineError:
        return PipelineError(
            f"the recorded run made {expected} network calls in {where}, this one made {came}: guidance is on in one "
            "of them only; keep guidance and negative prompts as they were, or call generate with the new ones first"
        )


def _forms(arguments: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors among arguments, also those in lists and dictionaries, in order."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, tuple(value.shape)
        elif isinstance(value, Mapping):
            yield from _forms({f"{name}[{key!r}]": part for key, part in value.items()})
        elif isinstance(value, (list, tuple)):
            yield from _forms({f"{name}[{number}]": part for number, part in enumerate(value)})


def _difference(name: str, before: tuple[int, ...] | None, now: tuple[int, ...] | None) -> PipelineError:
    """The error for an argument of another shape: what differs most likely, and what to do."""
    was, came = ("not given" if shape is None else f"of shape {shape}" for shape in (before, now))
    if before is None or now is None or len(before) != len(now):
        cause = "guidance, the number of prompts or what describes a prompt (its mask) is not the same. Keep these"
    else:
        axis = next(axis for axis, (left, right) in enumerate(zip(before, now, strict=True)) if left != right)
        if axis == 0 and len(now) > 2:
            cause = "guidance or the number of prompts is not the same. Keep both"
        elif len(now) > 3:
            cause = "the size is not the same. Keep it"
        else:
            cause = (
                f"a prompt has {now[axis]} tokens now and had {before[axis]}. Take one of as many tokens, or generate "
                "from embeddings that are padded to one length (with their masks, where the pipeline takes masks)"
            )
    return PipelineError(
        f"the network's argument {name} was {was} when the picture was generated and is {came} in this edit, because "
        f"{cause}; or call generate with the new arguments first"
    )
