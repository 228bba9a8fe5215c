"""How a session compiles a network of a pipeline: as a whole where that can be, and apart from all others.

PyTorch's compiler keeps graphs on the code of functions, which all networks of a class share. Where it cannot trace a
call inside of the network (an attention processor in compiled code, a cache of diffusers), it ends the graph before
that call, and takes the piece for every other network, and for the same one after what broke it is gone, because it
looks at what the piece has seen only. So a session asks for one graph or an error, on a code of the network's own: no
piece gets there. Only a network that is not one graph is compiled in pieces, elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.apart import OwnCode, compile_apart
from fisedit_compile.private.dynamo import GRAPH_BREAKS, OptimizedModule
from fisedit_compile.private.graphs import leaves
from fisedit_compile.private.modules import attributes
from fisedit_compile.runtime import PhaseSource, ReachCheck

BACKEND = "fisedit"
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


class CompiledRun:
    """Which calls of a run were made with the network compiled as a whole. An edit makes each call as the recorded run
    made it, or their graphs would not line up.

    Args:
        recorded: that of the picture that is edited; None for a generation.

    Attributes:
        broken_from: the first call with the network in pieces; None: there was none.
        reason: why it is in pieces, in PyTorch's words.
    """

    def __init__(self, recorded: CompiledRun | None = None) -> None:
        self.broken_from: int | None = None if recorded is None else recorded.broken_from
        self.reason: str = "" if recorded is None else recorded.reason
        self._edit = recorded is not None
        self._calls = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know."""
        if self.broken_from is None:
            return ()
        return (
            f"PyTorch's compiler cannot trace the network as a whole ({self.reason}), so it runs in several graphs; "
            "what runs between them is computed densely and not masked",
        )

    def next_is_whole(self) -> bool:
        """Begin a call; whether it is made with the network as a whole."""
        self._calls += 1
        return self.broken_from is None or self._calls <= self.broken_from

    def broke(self, reason: str, error: Exception | None = None) -> None:
        """The network of the call that has begun is not one graph: from this call on it is in pieces.

        Args:
            reason: why not, in PyTorch's words.
            error: that said so just now.

        Raises:
            PipelineError: in an edit, for which that is too late.
        """
        if self._edit:
            raise PipelineError(
                "PyTorch's compiler could trace the network as a whole when the picture was generated, and cannot in "
                f"this edit ({reason}): its modules, attention processors, caches or hooks are others. Put them back, "
                "or call generate first"
            ) from error
        self.broken_from, self.reason = self._calls - 1, reason


class Structure:
    """What a network consists of: its modules with their attributes and hooks; of objects only which they are."""

    def __init__(self, network: nn.Module) -> None:
        self._parts: list[Any] = []
        self._alive: list[ref[Any]] = []
        for module in network.modules():
            self._add(module)
            for name, value in attributes(module):
                self._parts.append(name)
                if isinstance(value, Mapping):
                    for key, inner in value.items():
                        self._parts.append(key if isinstance(key, PLAIN) else id(key))
                        self._add(inner)
                else:
                    self._add(value)

    def _add(self, value: Any) -> None:
        if isinstance(value, PLAIN):
            self._parts.append((type(value), value))
        elif inspect.ismethod(value):  # made anew whenever it is asked for
            self._add(value.__self__)
            self._add(value.__func__)
        elif not isinstance(value, Tensor):
            self._parts.append((type(value), id(value)))
            try:
                self._alive.append(ref(value))
            except TypeError:  # of a kind that cannot be watched, such as a list
                return

    def same(self, other: Structure) -> bool:
        """Whether the other one, which is new, is of the same objects: not of others that took their place in
        memory."""
        return self._parts == other._parts and all(watched() is not None for watched in self._alive)


@dataclass
class _Known:
    """What is known of a network: the code that its graph is kept on, and which calls, by the forms of their arguments,
    it was in pieces for, and why, when it was of this structure."""

    code: OwnCode = field(default_factory=OwnCode)
    structure: Structure | None = None
    pieces: dict[Any, str] = field(default_factory=dict)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
"""Sessions of one network share its graphs."""


class CompiledNetwork:
    """A network of a pipeline, compiled beside it.

    Args:
        module: the network; not changed.
        source: what it is compiled with.
        options: of the backend, without ``runtime``.

    Attributes:
        module: the network.
        stand_in: what is put in the place of the network: a module that hands all attributes through, and whose calls
            are compiled.

    Raises:
        PipelineError: PyTorch's compiler is switched off.
    """

    def __init__(self, module: nn.Module, source: PhaseSource, options: Mapping[str, Any]) -> None:
        self.module = module
        given = {**options, "runtime": source}
        self._known = _known.setdefault(module, _Known())
        self._whole = self._known.code.compile_whole(module, BACKEND, dict(given))
        self.stand_in = compile_apart(module, BACKEND, dict(given), f"{id(source)} {sorted(options.items())}")
        if not isinstance(self.stand_in, OptimizedModule):
            raise PipelineError(
                "PyTorch's compiler is switched off, and without it nothing can be recorded or edited; unset "
                "TORCHDYNAMO_DISABLE, or use the pipeline itself, without a session"
            )
        self._pieces: Callable[..., Any] = self.stand_in.forward
        self.stand_in.forward = self._call
        self._check = ReachCheck(source)
        self._signature = inspect.signature(module.forward)
        self._run: CompiledRun | None = None
        self._structure: Structure | None = None

    @contextmanager
    def following(self, run: CompiledRun) -> Iterator[None]:
        """Inside, calls are those of ``run``."""
        self._run, self._structure = run, None
        try:
            yield
        finally:
            self._run, self._structure = None, None

    def _call(self, *positional: Any, **named: Any) -> Any:
        end = self._check()
        result = self._compute(positional, named)
        end()
        return result

    def _compute(self, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        run = CompiledRun() if self._run is None else self._run
        if run.next_is_whole():
            arguments = self._by_name(positional, named)
            forms = self._forms(arguments)
            reason = self._reason(forms)
            if reason is not None:
                run.broke(reason)
            else:
                try:
                    return self._whole(*arguments[0], **arguments[1])
                except GRAPH_BREAKS as error:
                    reason = str(error).strip().partition("\n")[0]
                    run.broke(reason, error)
                    self._known.pieces[forms] = reason
        return self._pieces(*positional, **named)

    def _reason(self, forms: Any) -> str | None:
        """Why such a call is known not to be one graph; None: it is not known."""
        if self._structure is None or self._run is None:
            self._structure = Structure(self.module)
            if self._known.structure is None or not self._known.structure.same(self._structure):
                self._known.pieces = {}
            self._known.structure = self._structure
        return self._known.pieces.get(forms)

    def _by_name(self, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments by keyword, as far as possible: keywords name the inputs of a graph."""
        names = [
            name
            for name, parameter in self._signature.parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        if len(positional) > len(names) or not names:
            return positional, named
        return (), {**dict(zip(names, positional, strict=False)), **named}

    @staticmethod
    def _forms(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, ...]:
        """What the arguments are, without their content."""
        forms = (
            (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves(arguments)
        )
        return (*arguments[1], *forms)
