"""What a CUDA graph does, on a CPU: a tape of the operators that ran, which runs them again on the very same tensors.

As with a CUDA graph, everything that Python decided stays decided, memory stays where it was, and reading a value back
is an error. So a replay shows what a captured graph would get wrong: a table kept from an earlier mask, an input that
was not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisedit_compile.executing.replay import Captured
from fisedit_compile.operators.attention import native as attention
from fisedit_compile.operators.convolution import native as tiles
from fisedit_compile.operators.group_norm import native as norm
from fisedit_compile.operators.products import native as products
from fisedit_compile.operators.triton.launches import Launch

READS_BACK = ("_local_scalar_dense", "nonzero", "equal", "masked_select")


class Tape(TorchDispatchMode):
    """Notes what runs; :meth:`replay` runs it again, into the same results."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Callable[[], None]] = []
        self._made: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in READS_BACK:
            raise RuntimeError(f"{function} reads a value back while launches are captured")
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        kept = [value for value in tree_leaves(results) if isinstance(value, Tensor)]
        before = {value.data_ptr() for value in given}
        made = [value for value in kept if value.data_ptr() not in before]
        self._made += made

        def again() -> None:
            fresh = [value for value in tree_leaves(function(*args, **kwargs)) if isinstance(value, Tensor)]
            for value, computed in zip(kept, fresh, strict=True):
                if any(value is result for result in made):
                    value.copy_(computed)

        self._steps.append(again)
        return results

    def launch(self, launch: Launch) -> None:
        """Note a kernel of Triton's, which does not go through the dispatcher."""
        self._steps.append(lambda: RUN_LAUNCH(launch))
        # The interpreter of Triton calls PyTorch to read and write memory; that is the launch itself.
        with torch.utils._python_dispatch._disable_current_modes():
            RUN_LAUNCH(launch)

    def poison(self) -> None:
        """Capturing computes nothing: what is there before the first replay is garbage."""
        with torch.inference_mode():
            for value in self._made:
                if value.is_floating_point() and not value.is_mkldnn:
                    value.fill_(float("nan"))

    def replay(self) -> None:
        """Run it all again."""
        # What was made in inference mode may be changed only there.
        with torch.inference_mode():
            for step in self._steps:
                step()


RUN_LAUNCH = Launch.run


@contextmanager
def only_operators() -> Iterator[None]:
    """Without code that is compiled for the processor: no tape sees it run, and a GPU has none of it."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(attention, "_function", lambda dtype: None))
        for module in (norm, products, tiles):
            stack.enter_context(mock.patch.object(module, "_library", lambda *dtype: None))
        yield


class TapeCapturer:
    """Captures on a CPU; ``replays`` counts what was replayed."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.busy = False

    def available(self) -> bool:
        return not self.busy

    def capture(self, run: Callable[[], Sequence[Any]]) -> Captured:
        tape = Tape()
        with tape, mock.patch.object(Launch, "run", lambda launch: tape.launch(launch)):
            outputs = run()
        self.captures += 1
        tape.poison()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return Captured(replay, outputs)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        yield
