"""Edit graphs whose launches are captured once as a CUDA graph and replayed, for every later call of the same form.

A sparse call launches about a thousand small kernels; asking for them one by one takes longer than running them. A
captured graph is asked for at once, but reads and writes the memory that it was captured with. So what changes from
call to call is copied into static tensors first: latents, timesteps, prompts, index tables and recorded inputs. Weights
and what is made from them stay where they are, and their addresses are part of the form. Index tables are padded to a
few sizes (:func:`fisedit_compile.runtime.plans.bucket`), so that another mask of about the same size has the same form.

The first call of a form runs as usual: many forms come only once. The second one is captured.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from fisedit_compile.executing.lowering import Lowered
from fisedit_compile.executing.picking import picker
from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.triton.devices import one_capture
from fisedit_compile.operators.triton.reads import reads_cache
from fisedit_compile.private.cuda import end_failed_capture

logger = logging.getLogger(__name__)

#: Captured forms of a graph that are kept.
KEPT = 8
#: Replays of a form that are compared with launches one by one: with the inputs of the capture, and with others.
CHECKED = 2
#: Largest difference between them, as a share of the largest value. The kernels are the same, so are nearly all bits.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Captured:
    """A captured run: ``replay`` computes ``outputs`` again, from whatever its inputs hold by then."""

    replay: Callable[[], None]
    outputs: Sequence[Any]


class Capturer(Protocol):
    """What can capture launches."""

    device: torch.device

    def available(self) -> bool:
        """Whether something can be captured now: not while somebody else captures."""

    def capture(self, run: Callable[[], Sequence[Any]]) -> Captured:
        """Capture what ``run`` launches.

        Raises:
            RuntimeError: it did something that cannot be captured, such as reading a value back.
        """

    def ordered(self) -> AbstractContextManager[None]:
        """Uses of captured graphs by several threads and streams wait for each other, copies of their results
        included."""


_ADDRESS, _DEVICE = Tensor.data_ptr, attrgetter("device")


class CudaCapturer:
    """Captures CUDA graphs. All graphs of one capturer share memory for intermediates; replays take turns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._last: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        # The pool lives as long as a graph that uses it does: this one, until the capturer goes.
        self._keeper: Captured | None = None

    def available(self) -> bool:
        """See ``Capturer``."""
        with torch.cuda.device(self.device):
            return not torch.cuda.is_current_stream_capturing()

    def capture(self, run: Callable[[], Sequence[Any]]) -> Captured:
        """See ``Capturer``."""
        with one_capture(), torch.cuda.device(self.device):
            captured = False
            try:
                if self._keeper is None:
                    self._open_pool()
                result = self._capture(run)
                captured = True
            finally:
                if not captured:
                    # PyTorch before 2.12 takes the generator of random numbers for captured, and refuses to draw any,
                    # until a capture succeeds.
                    with suppress(RuntimeError):
                        self._open_pool()
            return result

    def _open_pool(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        self._keeper = self._capture(lambda: [torch.zeros(1, device=self.device)])

    def _capture(self, run: Callable[[], Sequence[Any]]) -> Captured:
        graph, stream, captured = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), False
        try:
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = run()
            captured = True
        finally:
            if not captured:
                # PyTorch leaves a failed capture on its stream, and its allocator believing that it goes on.
                torch.cuda.set_stream(stream)
                end_failed_capture(self.device, self._pool)
                self._keeper = None
        return Captured(graph.replay, outputs)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """See ``Capturer``."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            if self._last is not None:
                stream.wait_event(self._last)
            try:
                yield
            finally:
                self._last = stream.record_event()


@contextmanager
def _casts_not_kept() -> Iterator[None]:
    """Autocast keeps casts of weights until its region ends; a captured graph has to make its own."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor takes as much memory as it has elements, in any order of its dimensions."""
    if 0 in shape:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def capturer_for(devices: Iterable[torch.device]) -> Capturer | None:
    """What captures graphs with inputs on these devices; None where nothing does: without CUDA."""
    for device in devices:
        if device.type == "cuda" and torch.version.hip is None:
            return CudaCapturer(device)
    return None


@dataclass(frozen=True)
class Roles:
    """What the inputs of a graph are, by position.

    Attributes:
        count: how many inputs there are.
        held: tensors that stay where they are, such as parameters: read in place.
        stable: tensors that keep their values for as long as they exist, such as index tables and recorded maps. The
            others may be changed in place by anybody, and are copied at every call.
    """

    count: int
    held: frozenset[int]
    stable: frozenset[int]


class ReplayedGraph:
    """A lowered graph that is captured at the second call with inputs of one form, and replayed from then on."""

    def __init__(self, run: Lowered, roles: Roles, capturer: Capturer, label: str) -> None:
        """Prepare to capture a graph.

        Args:
            run: the graph.
            roles: of its inputs.
            capturer: for the device of its tensors.
            label: the graph in words, for messages.
        """
        self._run = run
        self._roles = roles
        self._capturer = capturer
        self._label = label
        self._lock = threading.Lock()
        self._held_positions = sorted(roles.held)
        self._held = picker(self._held_positions)
        self._others = [position for position in range(roles.count) if position not in roles.held]
        self._forms: OrderedDict[Hashable, _Form | None] = OrderedDict()
        self._statics: weakref.WeakValueDictionary[Hashable, _Static] = weakref.WeakValueDictionary()
        self.refusal: str | None = None

    def __call__(self, *given: Any) -> Sequence[Any]:
        """What the graph computes; tensors are the caller's own."""
        if self.refusal is not None or not self._capturer.available():
            return self._run_plainly(given)
        inputs, form = self._look(given)
        if form is None:
            return self._run_plainly(given)
        with self._lock, self._capturer.ordered():
            if form not in self._forms:
                self._forms[form] = None
                while len(self._forms) > KEPT:
                    self._forms.popitem(last=False)
                return self._run_plainly(inputs)
            self._forms.move_to_end(form)
            captured = self._forms[form]
            if captured is None:
                captured = self._forms[form] = _Form(inputs, self._roles, self._statics)
            return self._replay(captured, inputs)

    def _run_plainly(self, inputs: Sequence[Any]) -> Sequence[Any]:
        taken.note("edit graph: launched one by one")
        return self._run(*inputs)

    def _look(self, given: Sequence[Any]) -> tuple[list[Any], Hashable]:
        """The inputs as they are captured, and what a captured graph depends on besides the values of static tensors.

        This goes through some thousand tensors at every call, most of them weights, while the GPU may have nothing to
        do: weights are looked at by functions written in C.

        Returns:
            The inputs, but for gaps and overlaps in memory: static tensors then have the very same strides. And the
            form, or None: it cannot be captured.
        """
        inputs, device = list(given), self._capturer.device
        held = self._held(given)
        form: list[Hashable] = [*map(_ADDRESS, held)]
        for number, place in enumerate(map(_DEVICE, held)):
            if place != device:
                # Its value becomes part of the captured launches.
                if held[number].dim() > 0:
                    self._refuse_place(self._held_positions[number], place)
                    return inputs, None
                form[number] = held[number].item()
        for position in self._others:
            value = given[position]
            if not isinstance(value, Tensor):
                form.append(value)
                continue
            if value.device != device:
                self._refuse_place(position, value.device)
                return inputs, None
            shape, strides = value.shape, value.stride()
            if not is_dense(shape, strides):
                value = inputs[position] = value.contiguous()
                strides = value.stride()
            form.append((value.dtype, shape, strides))
        return inputs, tuple(form)

    def _refuse_place(self, position: int, place: torch.device) -> None:
        self._refuse(f"input {position} lies on {place}, not on {self._capturer.device}")

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self._forms.clear()
        logger.warning("%s runs without CUDA graphs: %s", self._label, reason)

    def _replay(self, form: _Form, inputs: Sequence[Any]) -> Sequence[Any]:
        form.fill(inputs)
        expected: Sequence[Any] | None = None
        if form.unchecked:
            arguments = form.arguments(inputs)
            with taken.apart() as form.ways:
                expected = self._run(*arguments)
            if form.captured is None:
                try:
                    with reads_cache.fresh(), _casts_not_kept(), taken.apart():
                        form.captured = self._capturer.capture(lambda: self._run(*arguments))
                except RuntimeError as error:
                    # What ends a capture says less than what made it fail.
                    self._refuse(str(error.__context__ or error).partition("\n")[0])
                    return expected
        if form.captured is None:
            raise RuntimeError(f"{self._label} was to be replayed but never captured")
        form.captured.replay()
        outputs = [value.clone() if isinstance(value, Tensor) else value for value in form.captured.outputs]
        if expected is not None:
            form.unchecked -= 1
            if reason := difference(outputs, expected):
                self._refuse(f"a replay differs from launches one by one: {reason}")
                return expected
        taken.add(form.ways)
        taken.note("edit graph: replayed")
        return outputs


class _Static:
    """Memory that captured launches read in place of an input.

    Attributes:
        tensor: the memory.
        last: what was copied there last, where that keeps its values for as long as it exists.
    """

    def __init__(self, like: Tensor) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.empty_like(like, requires_grad=False)
        self.last: weakref.ref[Tensor] | None = None


class _Form:
    """Static tensors for inputs of one form, and the graph captured with them.

    Forms of one graph share static tensors: most inputs do not depend on the mask's size.
    """

    def __init__(
        self, inputs: Sequence[Any], roles: Roles, known: weakref.WeakValueDictionary[Hashable, _Static]
    ) -> None:
        # Held tensors are not kept: a network that is deleted takes its weights along.
        self._copied: list[tuple[int, _Static]] = []
        for position, value in enumerate(inputs):
            if isinstance(value, Tensor) and position not in roles.held:
                key = (position, value.dtype, value.shape, value.stride())
                static = known.get(key)
                if static is None:
                    static = known[key] = _Static(value)
                self._copied.append((position, static))
        self._stable = roles.stable
        self.captured: Captured | None = None
        self.ways: Counter[str] = Counter()
        self.unchecked = CHECKED

    def arguments(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs with static tensors in place of those that are copied."""
        arguments = list(inputs)
        for position, static in self._copied:
            arguments[position] = static.tensor
        return arguments

    def fill(self, inputs: Sequence[Any]) -> None:
        """Copy what is not there already."""
        targets: dict[torch.dtype, list[Tensor]] = {}
        sources: dict[torch.dtype, list[Tensor]] = {}
        for position, static in self._copied:
            value = inputs[position]
            if static.last is not None and static.last() is value:
                continue
            static.last = weakref.ref(value) if position in self._stable else None
            targets.setdefault(value.dtype, []).append(static.tensor)
            sources.setdefault(value.dtype, []).append(value)
        for dtype, values in sources.items():
            # One launch for all tensors of a dtype.
            torch.ops.aten._foreach_copy_(targets[dtype], values)


def difference(outputs: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """Where two lists of results differ by more than rounding, in words; None: nowhere."""
    for number, (value, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if not isinstance(wanted, Tensor):
            continue
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            return f"output {number} is {value.dtype} {list(value.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        if not wanted.is_floating_point():
            if not torch.equal(value, wanted):
                return f"output {number} is another"
            continue
        first, second = value.double().nan_to_num(), wanted.double().nan_to_num()
        error, largest = float((first - second).abs().amax()) if first.numel() else 0.0, 0.0
        if error:
            largest = float(second.abs().amax())
        if error > TOLERANCES.get(wanted.dtype, 0.0) * largest or not torch.equal(value.isnan(), wanted.isnan()):
            return f"output {number} is off by {error:.3g}, its largest value is {largest:.3g}"
    return None
