"""What else was compiled in a process does not change what a session's network becomes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile import backend
from fisedit_compile.errors import CallMismatchError
from fisedit_compile.pipelines import EditSession, Picture, compiling
from fisedit_compile.pipelines.compiling import CompiledNetwork
from fisedit_compile.runtime import Relay, recompiles
from support.small_pipeline import (
    HEIGHT,
    WIDTH,
    Breaking,
    DecoratedNetwork,
    Network,
    OtherDecoratedNetwork,
    Plain,
    SmallPipeline,
)

MASK = torch.zeros(HEIGHT, WIDTH)
MASK[4:8, 6:14] = 1


def edited(session: EditSession) -> tuple[Picture, Picture]:
    base = session.generate("red", num_inference_steps=2, generator=torch.Generator().manual_seed(3))
    return base, session.edit("blue", mask=MASK)


def assert_whole(session: EditSession) -> None:
    """That a picture and an edit come out as one graph makes them."""
    base, edit = edited(session)
    assert base.report.notes == edit.report.notes == ()
    # Two steps, and each is one graph.
    assert session.runtime.stats.calls["edit"] >= 2 and len(session.runtime._store.bases[base.name].recordings) == 1
    alone = SmallPipeline(copy.deepcopy(session.pipe.unet))
    torch.compiler.reset()
    expected_base, expected = edited(EditSession(alone, decoder="dense"))
    assert torch.equal(base.latents, expected_base.latents) and torch.equal(edit.latents, expected.latents)


def break_and_run(network: nn.Module, run: Callable[[], Any]) -> None:
    before = network.second.processor
    network.second.processor = Breaking()
    run()
    network.second.processor = before


def test_another_network_of_the_class_broke_before_and_after() -> None:
    other, session = EditSession(SmallPipeline(), decoder="dense"), EditSession(SmallPipeline(), decoder="dense")
    break_and_run(other.pipe.unet, lambda: edited(other))
    assert_whole(session)
    break_and_run(other.pipe.unet, lambda: edited(other))
    assert_whole(session)


def test_the_same_network_broke_and_was_put_right() -> None:
    session = EditSession(SmallPipeline(), decoder="dense")
    break_and_run(session.pipe.unet, lambda: edited(session))
    assert_whole(session)


@pytest.mark.parametrize("breaking", [DecoratedNetwork, OtherDecoratedNetwork])
def test_decorated_forwards_of_two_classes_share_a_code(breaking: type[nn.Module]) -> None:
    (other,) = {DecoratedNetwork, OtherDecoratedNetwork} - {breaking}
    broken, session = (EditSession(SmallPipeline(kind()), decoder="dense") for kind in (breaking, other))
    break_and_run(broken.pipe.unet, lambda: edited(broken))
    assert_whole(session)


@pytest.mark.parametrize("name", ["eager", "fisedit"])
def test_the_user_compiled_the_network_before(name: str) -> None:
    pipe = SmallPipeline()
    plain = pipe.unet
    pipe.unet = torch.compile(pipe.unet, backend=name)
    break_and_run(plain, lambda: pipe("red"))
    pipe("red")
    assert_whole(EditSession(pipe, decoder="dense"))
    pipe.unet = plain


def test_a_network_that_breaks_runs_in_pieces_and_the_report_says_so() -> None:
    pipe = SmallPipeline()
    session = EditSession(pipe, decoder="dense")
    pipe.unet.second.processor = Breaking()
    base, edit = edited(session)
    for picture in (base, edit):
        (note,) = picture.report.notes
        assert "cannot trace the network as a whole" in note and "several graphs" in note
    # The second time it is known.
    assert edited(session)[0].report.notes == base.report.notes
    pipe.unet.second.processor = Plain()
    assert_whole(session)


def test_a_break_that_comes_with_an_edit_is_refused() -> None:
    session = EditSession(SmallPipeline(), decoder="dense")
    session.generate("red", generator=torch.Generator().manual_seed(3))
    network = session.pipe.unet
    before, network.second.processor = network.second.processor, Breaking()
    with pytest.raises(fisedit.errors.PipelineError, match="cannot in this edit .* Put them back"):
        session.edit("blue", mask=MASK)
    network.second.processor = before
    assert session.edit("blue", mask=MASK).report.notes == ()


def test_a_hook_that_breaks_is_noticed_when_it_comes_and_goes() -> None:
    session = EditSession(SmallPipeline(), decoder="dense")
    handle = session.pipe.unet.first.register_forward_hook(lambda _, given, result: Breaking()(result))
    assert len(edited(session)[0].report.notes) == 1
    handle.remove()
    assert_whole(session)


def test_only_the_calls_from_a_break_on_are_in_pieces() -> None:
    """A callback that exchanges a processor: the same happens in the edit, call by call."""
    session = EditSession(SmallPipeline(), decoder="dense")
    network = session.pipe.unet

    def exchange(pipe: Any, call: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        network.second.processor = Breaking() if call == 0 else Plain()
        return tensors

    base = session.generate("red", num_inference_steps=2, callback_on_step_end=exchange)
    edit = session.edit("blue", mask=MASK)
    assert len(base.report.notes) == 1 and edit.report.notes == base.report.notes
    # The network as a whole, and itself and its second block, each in two pieces.
    assert len(session.runtime._store.bases[base.name].recordings) == 1 + 4


def call(network: nn.Module, relay: Relay) -> weakref.ref[nn.Module]:
    compiled = CompiledNetwork(network, relay, {"norm": "exact"})
    with torch.no_grad():
        compiled.stand_in(torch.ones(1, 4, 7, 11), torch.tensor(3), prompt=torch.ones(1, 1, 8))
    return weakref.ref(network)


@pytest.mark.parametrize("processor", [Plain, Breaking])
def test_networks_that_come_and_go_leave_nothing(processor: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits hold for all that ever was of a code, so that any growth would be an error after some networks."""
    monkeypatch.setattr(recompiles, "GRAPHS", 2)
    relay = Relay()
    gc.collect()
    before = len(compiling._known)
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=3), recompiles.strict_recompiles():
        for _ in range(5):
            network = Network().eval().requires_grad_(False)
            network.second.processor = processor()
            freed = call(network, relay)
            del network
            gc.collect()
            assert freed() is None
    assert len(compiling._known) == before


def test_sessions_of_one_network_share_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    build = backend.CompiledGraph.__init__

    def counting(self: Any, *arguments: Any) -> None:
        made.append(self)
        build(self, *arguments)

    monkeypatch.setattr(backend.CompiledGraph, "__init__", counting)
    pipe = SmallPipeline()
    for _ in range(3):
        edited(EditSession(pipe, decoder="dense"))
    assert len(made) == 1


def test_a_structure_is_of_the_same_objects() -> None:
    network = Network()
    structure = compiling.Structure(network)
    assert structure.same(compiling.Structure(network))
    before = network.second.processor
    for exchange in (
        lambda: setattr(network.second, "processor", Plain()),
        lambda: setattr(network.second, "scale", 0.5),
        lambda: network.first.register_forward_pre_hook(lambda module, given: None),
        lambda: setattr(network, "first", copy.deepcopy(network.first)),
    ):
        exchange()
        changed = compiling.Structure(network)
        assert not structure.same(changed) and changed.same(compiling.Structure(network))
        structure = changed
    # The same place in memory is not the same object.
    network.second.processor = before
    structure = compiling.Structure(network)
    place = id(before)
    network.second.processor = None
    del before
    new = [Plain() for _ in range(100)]
    network.second.processor = next((one for one in new if id(one) == place), new[0])
    assert not structure.same(compiling.Structure(network))


def test_without_a_compiler_there_is_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Network):
        """A class that nothing was compiled of."""

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(fisedit.errors.PipelineError, match="compiler is switched off"):
        EditSession(SmallPipeline(Own()), decoder="dense").generate("red")


def test_a_session_whose_network_is_told_to_run_eagerly_is_refused() -> None:
    session = EditSession(SmallPipeline(), decoder="dense")
    with torch.compiler.set_stance("force_eager"), pytest.raises(CallMismatchError, match="came to none of its graphs"):
        session.generate("red")
