"""Sessions beside others: threads that share networks, previews, cancel buttons; nothing of the user's is touched."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import EditSession
from support.tiny_pipelines import HEIGHT, SCALE, WIDTH, picture_arguments, tiny_pipeline, tiny_tokenizer

KEEPS_DYNAMO = True
BASE, FIRST = "a red ball on grass", "a blue ball on grass"
STEPS = 4


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    torch.compiler.reset()
    yield tiny_pipeline()
    torch.compiler.reset()


def arguments(seed: int = 4, **changes: Any) -> dict[str, Any]:
    given = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed)}
    return {**given, **picture_arguments("text-to-image"), **changes}


def box() -> Tensor:
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[4:10, 6:16] = 1
    return mask


def beside(pipe: Any, **parts: Any) -> Any:
    """A pipeline of its own with the networks of another one."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    made = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": scheduler, "tokenizer": tiny_tokenizer(), **parts},
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def state_of(pipe: Any) -> dict[str, Any]:
    """Everything that a session could leave behind in a pipeline and its networks."""
    found: dict[str, Any] = {"pipe": dict(vars(pipe)), "scheduler": dict(vars(pipe.scheduler)), "type": type(pipe)}
    for name in ("unet", "vae", "text_encoder"):
        for path, module in getattr(pipe, name).named_modules():
            held = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
            found[f"{name}.{path}"] = (id(module), type(module), held)
    return found


def changed(before: Any, after: Any, where: str = "") -> list[str]:
    """Where two states do not hold the same objects."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = {**before, **after}
        return [at for name in names for at in changed(before.get(name), after.get(name), f"{where}[{name!r}]")]
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [at for number, pair in pairs for at in changed(*pair, f"{where}[{number}]")]
    same = before is after or (isinstance(before, (int, float, str)) and before == after)
    return [] if same else [where]


def test_nothing_of_the_users_is_touched_even_during_a_call(pipe: Any) -> None:
    before, seen = state_of(pipe), []

    def look(given: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.extend(changed(before, state_of(pipe)))
        assert given.unet is pipe.unet and given.vae is pipe.vae and isinstance(given, type(pipe))
        assert given.num_timesteps == STEPS and given.guidance_scale == 7.5
        return tensors

    session = EditSession(pipe, decoder="region")
    session.generate(BASE, **arguments(callback_on_step_end=look))
    session.edit(FIRST, mask=box())
    with pytest.raises(RuntimeError, match="failed"):
        session.edit(FIRST, mask=box(), callback_on_step_end=fail)
    assert seen == [] == changed(before, state_of(pipe))


def fail(*_: Any) -> dict[str, Any]:
    raise RuntimeError("failed")


@pytest.mark.parametrize("decoder", ["sparse", "region"])
def test_others_decode_as_ever_while_a_session_decodes(pipe: Any, decoder: str) -> None:
    session, latents = EditSession(pipe, decoder=decoder), torch.ones(1, 4, HEIGHT // SCALE, WIDTH // SCALE)
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample
    found: list[Tensor] = []

    def other() -> None:
        with torch.no_grad():
            found.append(pipe.vae.decode(latents).sample)

    def hook(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    base = session.generate(BASE, **arguments())
    quiet = session.edit(FIRST, mask=box(), keep=False)
    handle = pipe.vae.post_quant_conv.register_forward_hook(hook)
    try:
        again = session.generate(BASE, **arguments())
        edited = session.edit(FIRST, mask=box(), keep=False)
    finally:
        handle.remove()
    assert edited.report.decoder == decoder and len(found) == 2
    assert all(torch.equal(one, expected) for one in found)
    assert torch.equal(base.pixels, again.pixels) and torch.equal(quiet.pixels, edited.pixels)


def test_previews_are_not_taken_for_the_picture(pipe: Any) -> None:
    quiet = EditSession(pipe)
    expected, edited = quiet.generate(BASE, **arguments()), quiet.edit(FIRST, mask=box())

    for which in ("given", "own"):

        def preview(given: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            shown = (given if which == "given" else pipe).vae.decode(tensors["latents"]).sample  # noqa: B023
            assert torch.isfinite(shown).all()
            return tensors

        session = EditSession(pipe)
        base = session.generate(BASE, **arguments(callback_on_step_end=preview))
        assert torch.equal(base.pixels, expected.pixels)
        edit = session.edit(FIRST, mask=box())
        assert torch.equal(edit.pixels, edited.pixels) and edit.report.decoder == edited.report.decoder == "sparse"


def test_older_callbacks_may_show_previews_too(pipe: Any) -> None:
    session, seen = EditSession(pipe), []
    expected = session.generate(BASE, **arguments())

    def preview(step: int, timestep: Any, latents: Tensor) -> None:
        seen.append(pipe.vae.decode(latents).sample + torch.randn(()))

    base = session.generate(BASE, **arguments(callback=preview, callback_steps=1))
    assert torch.equal(base.pixels, expected.pixels) and len(seen) == STEPS
    assert session.edit(FIRST, mask=box()).report.decoder == "sparse" and len(seen) == 2 * STEPS


@pytest.fixture
def cancelling(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], None]:
    """Have another thread cancel a pipeline's run in the middle of a step."""
    step = DDIMScheduler.step

    def cancel(pipe: Any, at: int) -> None:
        steps = 0

        def stepping(self: Any, *positional: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == at:
                thread = threading.Thread(target=setattr, args=(pipe, "_interrupt", True))
                thread.start()
                thread.join()
            return step(self, *positional, **named)

        monkeypatch.setattr(DDIMScheduler, "step", stepping)

    return cancel


@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_cancel_button_keeps_the_history(pipe: Any, cancelling: Callable[[Any, int], None], at: int) -> None:
    """The first two steps of a generation are computed twice."""
    session = EditSession(pipe)
    base = session.generate(BASE, **arguments())
    cancelling(pipe, at)
    message = r"cancelled after call \d of 4"
    with pytest.raises(PipelineError, match=message):
        session.generate(FIRST, **arguments(num_inference_steps=4))
    assert session.history == (base,)
    cancelling(pipe, 2)
    with pytest.raises(PipelineError, match=message):
        session.edit(FIRST, mask=box())
    assert session.history == (base,) and session.runtime.bases == (base.name,)
    cancelling(pipe, -1)
    assert session.edit(FIRST, mask=box()).report.sparse_calls == STEPS, "an old request is forgotten"


def test_what_a_callback_sets_on_the_wrong_pipeline_is_refused(pipe: Any) -> None:
    session = EditSession(pipe)

    def set_scale(given: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 3.0
        return tensors

    def exchange(given: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        given.unet = torch.nn.Linear(1, 1)
        return tensors

    try:
        with pytest.raises(PipelineError, match="set _guidance_scale of the session's own pipeline to 3.0"):
            session.generate(BASE, **arguments(callback_on_step_end=set_scale))
    finally:
        vars(pipe).pop("_guidance_scale")
    with pytest.raises(PipelineError, match="exchanged the pipeline's unet"):
        session.generate(BASE, **arguments(callback_on_step_end=exchange))


def test_many_threads_share_networks(pipe: Any) -> None:
    """Sessions, plain calls, previews and cancelled runs at random: each picture is that of a quiet run."""
    threads, rounds = 8, 2
    ancestral = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    pipes = [beside(pipe, scheduler=ancestral) if number % 2 else beside(pipe) for number in range(threads // 2)]
    pipes = [beside(one, scheduler=type(one.scheduler).from_config(one.scheduler.config)) for one in pipes]

    def plain(one: Any, seed: int) -> Tensor:
        result: Tensor = one(BASE, output_type="pt", **arguments(seed)).images
        return result

    def edited(session: EditSession, seed: int, **more: Any) -> tuple[Tensor, Tensor]:
        base = session.generate(BASE, **arguments(seed, **more))
        return base.pixels, session.edit(FIRST, mask=box(), keep=bool(seed % 2)).pixels

    decoders = ("sparse", "region", "auto", "dense")

    def session_of(number: int) -> EditSession:
        return EditSession(pipes[number], decoder=decoders[number])

    runs = [(number, seed) for number in range(len(pipes)) for seed in range(rounds)]
    quiet = {(number, seed): edited(session_of(number), seed) for number, seed in runs}
    alone = {(number, seed): plain(pipes[number], seed) for number, seed in runs}
    before = [state_of(one) for one in pipes]
    keys = list(pipe.vae.state_dict())

    def preview(given: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        given.vae.decode(tensors["latents"])
        return tensors

    def cancel(given: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        given._interrupt = call == 1
        return tensors

    def work(thread: int) -> None:
        """Half of the threads have sessions, each beside one that calls the same pipeline itself."""
        choice, number = random.Random(thread), thread // 2
        session = session_of(number)
        for seed in range(rounds):
            if thread % 2:
                torch.testing.assert_close(plain(pipes[number], seed), alone[number, seed], atol=1e-5, rtol=0)
                continue
            if choice.random() < 0.5:
                with pytest.raises(PipelineError, match="interrupted"):
                    session.generate(FIRST, **arguments(seed, callback_on_step_end=cancel))
            more = {"callback_on_step_end": preview} if choice.random() < 0.5 else {}
            base, edit = edited(session, seed, **more)
            torch.testing.assert_close(base, quiet[number, seed][0], atol=1e-5, rtol=0)
            torch.testing.assert_close(edit, quiet[number, seed][1], atol=1e-5, rtol=0)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, thread) for thread in range(threads)]:
            done.result()
    # What a plain call leaves in its pipeline and scheduler is its own.
    for one, state in zip(pipes, before, strict=True):
        assert not changed({**state, "pipe": 0, "scheduler": 0}, {**state_of(one), "pipe": 0, "scheduler": 0})
    assert list(pipe.vae.state_dict()) == keys
