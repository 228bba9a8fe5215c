"""The random generators of a run: made, remembered, and rebuilt in the state they had at its start."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisedit_compile.errors import PipelineError

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class NoiseSource:
    """The devices and states of the generators of a run at its start.

    Not every pipeline takes latents, and some schedulers draw noise at every step; starting again from the generators'
    states repeats all of it.

    Attributes:
        devices: one for each generator.
        states: one for each generator, as ``torch.Generator.get_state`` returns it; empty: the run had none, and all
            its noise is noted by :mod:`fisedit_compile.pipelines.random_numbers`.
        single: whether the run had one generator, not a list of one.
    """

    devices: tuple[torch.device, ...]
    states: tuple[torch.Tensor, ...]
    single: bool

    @classmethod
    def of(cls, generators: Generators) -> NoiseSource:
        """Remember the present state of the generators.

        Raises:
            PipelineError: they are neither a generator nor a list of generators nor None.
        """
        check_generators(generators)
        if generators is None:
            return cls((), (), False)
        every = [generators] if isinstance(generators, torch.Generator) else generators
        return cls(
            tuple(one.device for one in every),
            tuple(one.get_state() for one in every),
            isinstance(generators, torch.Generator),
        )

    def generators(self) -> Generators:
        """New generators in the remembered states; the user's own are left as they are."""
        made = []
        for device, state in zip(self.devices, self.states, strict=True):
            generator = torch.Generator(device)
            generator.set_state(state)
            made.append(generator)
        return made[0] if self.single else made or None


def check_generators(generators: Generators) -> None:
    """Refuse what is no source of noise.

    Raises:
        PipelineError: it is neither a generator nor a list of generators nor None.
    """
    if generators is None or isinstance(generators, torch.Generator):
        return
    if not isinstance(generators, list) or not generators or not all(_is_generator(one) for one in generators):
        raise PipelineError(f"generator must be a torch.Generator or a list of them, got {generators!r}")


def _is_generator(value: object) -> bool:
    return isinstance(value, torch.Generator)
