"""Random numbers of pipeline calls: what a recorded run drew, an edit draws again.

Most pipelines take a generator. But some operators are called without one, in schedulers, in encoders of control
pictures and in callbacks, and then draw from a generator of the process, which other threads use as well and which
belongs to the user. So a run notes what its thread draws, and an edit gets that, by a dispatch of the thread's own; no
state of any generator is set.

Only while it is needed: the networks run without the dispatch (what a network draws inside is not followed), and an
edit leaves out the schedulers and text encoders that drew nothing in the recorded run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import FisEditError, PipelineError
from fisedit_compile.pipelines.arguments import keep_value
from fisedit_compile.pipelines.twin import independent_copy
from fisedit_compile.private.graphs import FakeTensor, TorchDispatchMode, pop_mode, push_mode
from fisedit_compile.private.operators import schema_of

PIPELINE, PROMPTS, SCHEDULER = "pipeline", "prompts", "scheduler"
"""Who draws: the pipeline itself, the encoding of prompts, the scheduler. Callbacks are told apart by their turn."""

TRIED_STEPS = 2
"""How many steps of a generation's scheduler are computed a second time, to see whether they are the same again."""


@dataclass(frozen=True)
class _Draw:
    """What one operator drew.

    Attributes:
        operator: its name, and its arguments without the values of tensors.
        values: what it made, where that depends on no values; None: it does.
        state: of the generator at its start, where that tells what it makes of any values; None: it does not.
    """

    operator: tuple[Any, ...]
    values: tuple[Tensor, ...] | None
    state: Tensor | None


class RandomNumbers:
    """What the calling thread draws at random in one pipeline call.

    Args:
        recorded: of the run that is edited, which is repeated; None for a generation.
    """

    def __init__(self, recorded: RandomNumbers | None = None) -> None:
        self._recorded = recorded
        self._draws: dict[str, list[_Draw]] = {}
        self._used: dict[str, int] = {}
        self._mode = _Dispatch(self)
        self._on = self._running = self._paused = self._narrow = False
        self._section = PIPELINE
        self._before_loop: int | None = None
        self._after_loop: int | None = None
        self._loop_draws = False
        self._follows_steps = False

    @property
    def drawn(self) -> int:
        """How often something was drawn, or drawn again, so far."""
        return sum(map(len, self._draws.values())) + sum(self._used.values())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Follow what this thread draws inside."""
        self._running = True
        self._update()
        try:
            yield
        finally:
            self._running = False
            self._update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let networks run as if nothing was followed."""
        before, self._paused = self._paused, True
        self._update()
        try:
            yield
        finally:
            self._paused = before
            self._update()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What is drawn inside belongs to ``name``."""
        before, self._section = self._section, name
        self._update()
        try:
            yield
        finally:
            self._section = before
            self._update()

    def callback(self, turn: int) -> AbstractContextManager[None]:
        """What is drawn inside belongs to the user's callback behind a turn of the loop. It may be another one than the
        recorded run had, and draw whatever it wants."""
        return self.section(f"callback {turn}")

    def begin_loop(self) -> None:
        """The network is about to be called."""
        if self._before_loop is None:
            self._before_loop = len(self._draws.get(PIPELINE, ()))
            if self._recorded is not None:
                self._narrow = self._follows_steps and not self._recorded._loop_draws
                self._update()

    def end_turn(self, last: bool) -> None:
        """A turn of the loop is done. Where nothing but the scheduler drew in the first one, nothing else is followed
        in the others."""
        if self._recorded is None and self._before_loop is not None:
            self._loop_draws |= len(self._draws.get(PIPELINE, ())) > self._before_loop
            self._narrow = self._follows_steps and not self._loop_draws
        if last:
            self._after_loop = len(self._draws.get(PIPELINE, ()))
            self._narrow = self._recorded is not None and not self._recorded._drew_after_loop
        self._update()

    @property
    def _drew_after_loop(self) -> bool:
        return self._after_loop is None or len(self._draws.get(PIPELINE, ())) > self._after_loop

    def follow_scheduler(self, scheduler: Any) -> None:
        """Follow the steps of a scheduler that belongs to this run alone.

        The first steps of a generation are computed twice: what a scheduler draws from elsewhere (numpy, the system),
        or remembers from other runs, would make every edit wrong.
        """
        original = scheduler.step
        steps = 0

        @wraps(original)
        def step(*positional: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            with self.section(SCHEDULER):
                if self._recorded is not None or steps > TRIED_STEPS:
                    return original(*positional, **named)
                return self._tried_step(scheduler, original, positional, named)

        vars(scheduler)["step"] = step
        self._follows_steps = True

    def _tried_step(
        self, scheduler: Any, step: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        # A copy of the scheduler itself, without what follows its steps.
        followed = vars(scheduler).pop("step")
        try:
            trial = independent_copy(scheduler)
        finally:
            vars(scheduler)["step"] = followed
        inputs, settings = keep_value(positional), keep_value(named)
        start = len(self._draws.get(SCHEDULER, ()))
        result = step(*positional, **named)
        if trial is None:
            return result
        again = RandomNumbers(self)
        again._used[SCHEDULER], again._section = start, SCHEDULER
        with self.paused(), again.running():
            repeated = trial.step(*inputs, **settings)
        if not _same(result[0], repeated[0]):
            raise PipelineError(
                f"{type(scheduler).__name__} makes other latents when a step is repeated: it takes random numbers from "
                "elsewhere than PyTorch's generators, so no edit could have the noise of the picture; give it a seed "
                "or a generator, or use another scheduler"
            )
        return result

    def draw(self, operator: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """The result of a random operator: drawn, or as it was drawn in the recorded run.

        Raises:
            PipelineError: the recorded run drew something else.
        """
        call = _Call(operator, tuple(positional), dict(named))
        if self._recorded is None:
            draw, result = call.noted()
            self._draws.setdefault(self._section, []).append(draw)
            return result
        number = self._used.get(self._section, 0)
        self._used[self._section] = number + 1
        known = self._recorded._draws.get(self._section, ())
        if number < len(known) and known[number].operator == call.description:
            return call.repeated(known[number])
        if self._section not in (PIPELINE, PROMPTS, SCHEDULER):
            return operator(*positional, **named)
        was = known[number].operator[0] if number < len(known) else "nothing"
        raise PipelineError(
            f"the run draws random numbers by {call.description[0]} where the run of the picture drew {was}"
            f"{' of another form' if was == call.description[0] else ''}, so it would not have the picture's noise; "
            "take back what changes it, or call generate with the new arguments first"
        )

    def _wanted(self) -> bool:
        """Whether what happens now has to be followed."""
        if not self._running or self._paused:
            return False
        if self._section == PIPELINE:
            return not self._narrow
        return self._recorded is None or self._section in self._recorded._draws

    def _update(self) -> None:
        wanted = self._wanted()
        if wanted == self._on:
            return
        self._on = wanted
        if wanted:
            push_mode(self._mode)
        elif pop_mode() is not self._mode:
            raise FisEditError("a dispatch mode that was entered in a session's call was not left again")


class _Dispatch(TorchDispatchMode):
    """Brings random operators of this thread to a run."""

    def __init__(self, numbers: RandomNumbers) -> None:
        super().__init__()
        self._numbers = numbers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if not _may_draw(func) or not _draws(func, args, named):
            return func(*args, **named)
        return self._numbers.draw(func, args, named)


@lru_cache(maxsize=4096)
def _may_draw(operator: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operator.tags


def _draws(operator: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether a random operator draws: attention with a dropout of zero does not, nor what the compiler only traces."""
    for argument, value in _bound(operator, positional, named):
        if argument.name in ("p", "dropout_p", "dropout") and isinstance(value, (int, float)) and value == 0:
            return False
        if argument.name in ("train", "training") and value is False:
            return False
        if isinstance(value, FakeTensor) or str(value) == "meta":
            return False
    return True


def _bound(operator: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The arguments of an operator with their values, also those that were left out."""
    for number, argument in enumerate(schema_of(operator).arguments):
        if number < len(positional):
            yield argument, positional[number]
        else:
            yield argument, named.get(argument.name, argument.default_value)


class _Call:
    """A call of a random operator.

    Attributes:
        description: the operator's name and its arguments without values of tensors and generators.
    """

    def __init__(self, operator: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._operator, self._positional, self._named = operator, positional, named
        bound = list(_bound(operator, positional, named))
        self._written = [value for argument, value in bound if _is_written(argument) and isinstance(value, Tensor)]
        like = operator.__name__.split(".")[0].endswith("_like")
        self._reads = not like and any(
            isinstance(value, Tensor) and not _is_written(argument) for argument, value in bound
        )
        self._generator = next((value for _, value in bound if isinstance(value, torch.Generator)), None)
        self._device = next((value.device for _, value in bound if isinstance(value, Tensor)), torch.device("cpu"))
        self._takes_generator = any(argument.name == "generator" for argument in schema_of(operator).arguments)
        described = tuple((argument.name, _description(value)) for argument, value in bound)
        self.description = (str(operator), *(part for part in described if part[0] != "generator"))

    def noted(self) -> tuple[_Draw, Any]:
        """Draw, and how to do so again."""
        source = self._generator or _default_generator(self._device)
        followed = self._reads and not self._written and self._takes_generator and source is not None
        state = source.get_state() if followed and source is not None else None
        result = self._operator(*self._positional, **self._named)
        if not self._reads:
            made = tuple(value.clone() for value in self._written or _tensors(result))
            return _Draw(self.description, made, None), result
        if state is not None and not _same(self._from_state(state), result):
            state = None  # another thread drew from the generator at the same moment
        return _Draw(self.description, None, state), result

    def repeated(self, draw: _Draw) -> Any:
        """What was drawn.

        Raises:
            PipelineError: it depends on values, and cannot be told for others.
        """
        if draw.values is not None and self._written:
            for value, made in zip(self._written, draw.values, strict=True):
                value.copy_(made)
            return self._written[0] if len(self._written) == 1 else tuple(self._written)
        if draw.values is not None:
            values = tuple(made.clone() for made in draw.values)
            return values[0] if len(values) == 1 else values
        if draw.state is not None:
            return self._from_state(draw.state)
        raise PipelineError(
            f"the pipeline draws random numbers by {self.description[0]}, which a session cannot repeat in an edit; "
            "switch off what draws them (a part in training mode: call its eval())"
        )

    def _from_state(self, state: Tensor) -> Any:
        generator = torch.Generator(self._device if self._generator is None else self._generator.device)
        generator.set_state(state)
        kept = [None if isinstance(value, torch.Generator) else value for value in self._positional]
        return self._operator(*kept, **{**self._named, "generator": generator})


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _description(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    return tuple(map(_description, value)) if isinstance(value, (list, tuple)) else value


def _default_generator(device: torch.device) -> torch.Generator | None:
    """The generator of the process for a device; None where it is not known."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return None


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _same(left: Any, right: Any) -> bool:
    """Whether two results hold the same tensors, where NaN is itself."""
    pairs = zip(_tensors(left), _tensors(right), strict=True)
    return all(torch.equal(one.nan_to_num(nan=0.5), other.nan_to_num(nan=0.5)) for one, other in pairs)
