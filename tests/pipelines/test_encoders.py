"""Texts that were encoded before are not encoded again, and nothing else is taken for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fisedit_compile.pipelines.encoders import REMEMBERED, EncoderMemory
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from support.tiny_pipelines import tiny_pipeline


class Encoder(torch.nn.Module):
    """Counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 3)
        self.scale = 1.0
        self.calls: list[int] = []

    def forward(self, words: torch.Tensor, mask: Any = None) -> dict[str, torch.Tensor]:
        self.calls.append(1)
        return {"last": self.scale * self.table(words)}


class Pipe:
    def __init__(self) -> None:
        self.text_encoder = Encoder().eval()
        self.text_encoder_2 = None
        self.unet = Encoder().eval()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield Pipe()


def run(memory: EncoderMemory, pipe: Any, *words: list[int], **named: Any) -> list[torch.Tensor]:
    """Encode texts in one call of the pipeline."""
    view = memory.views(pipe, RandomNumbers())["text_encoder"]
    return [view(torch.tensor([text]), **named)["last"] for text in words]


def test_equal_texts_are_encoded_once(pipe: Pipe) -> None:
    memory, calls = EncoderMemory(), pipe.text_encoder.calls
    first = run(memory, pipe, [1, 2], [3, 4])
    again = run(memory, pipe, [1, 2], [3, 5], [3, 4])
    assert len(calls) == 3
    assert torch.equal(again[0], first[0]) and torch.equal(again[2], first[1])
    assert torch.equal(again[1], pipe.text_encoder.table(torch.tensor([[3, 5]])))
    run(memory, pipe, [1, 2], mask=torch.ones(2))
    assert len(calls) == 4, "other arguments are another call"


def test_a_result_that_is_changed_in_place_is_not_remembered_so(pipe: Pipe) -> None:
    memory = EncoderMemory()
    for _ in range(3):
        (result,) = run(memory, pipe, [1, 2])
        assert torch.equal(result, pipe.text_encoder.table(torch.tensor([[1, 2]])))
        result.zero_()


def test_other_weights_and_settings_are_noticed(pipe: Pipe) -> None:
    memory, encoder = EncoderMemory(), pipe.text_encoder
    (before,) = run(memory, pipe, [1, 2])
    encoder.table.weight.data.add_(1)  # leaves no trace but the content
    assert torch.equal(run(memory, pipe, [1, 2])[0], encoder.table(torch.tensor([[1, 2]])))
    encoder.scale = 2.0
    assert torch.allclose(run(memory, pipe, [1, 2])[0], 2 * (before + 1))
    pipe.text_encoder = Encoder().eval()
    assert torch.equal(run(memory, pipe, [1, 2])[0], pipe.text_encoder.table(torch.tensor([[1, 2]])))
    assert len(encoder.calls) == 3


def test_what_is_drawn_at_random_is_not_remembered(pipe: Pipe) -> None:
    memory, encoder = EncoderMemory(), pipe.text_encoder
    numbers = RandomNumbers()
    original = encoder.table.forward
    encoder.table.forward = lambda words: original(words) + torch.rand(3)
    view = memory.views(pipe, numbers)["text_encoder"]
    with numbers.running():
        results = [view(torch.tensor([[1, 2]]))["last"] for _ in range(2)]
    assert len(encoder.calls) == 2 and not torch.equal(*results)
    encoder.table.forward = original
    encoder.train()
    run(memory, pipe, [1, 2], [1, 2])
    assert len(encoder.calls) == 4, "a part in training mode may draw"


def test_autocast_and_gradients_make_another_result(pipe: Pipe) -> None:
    memory, encoder = EncoderMemory(), pipe.text_encoder
    run(memory, pipe, [1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        run(memory, pipe, [1, 2])
    with torch.enable_grad():
        assert run(memory, pipe, [1, 2])[0].requires_grad
    assert len(encoder.calls) == 3


def test_only_the_last_results_are_kept(pipe: Pipe) -> None:
    memory, encoder = EncoderMemory(), pipe.text_encoder
    run(memory, pipe, *([word, 0] for word in range(REMEMBERED)), [8, 8], [1, 0])
    assert len(encoder.calls) == REMEMBERED + 1
    run(memory, pipe, [0, 0])
    assert len(encoder.calls) == REMEMBERED + 2


def test_only_encoders_that_are_called_as_they_are_have_views(pipe: Pipe) -> None:
    memory = EncoderMemory()
    assert memory.views(pipe, RandomNumbers()).keys() == {"text_encoder"}
    pipe.text_encoder.forward = pipe.text_encoder.forward  # what others put there may not repeat itself
    assert not memory.views(pipe, RandomNumbers())
    del pipe.text_encoder.forward
    pipe.text_encoder = torch.compile(pipe.text_encoder)
    assert not memory.views(pipe, RandomNumbers())


def test_encoders_with_hooks_of_others_have_no_views(pipe: Pipe) -> None:
    """What a hook does may depend on anything, so nothing that it had a part in is remembered."""
    memory = EncoderMemory()
    hook = pipe.text_encoder.table.register_forward_hook(lambda module, given, output: 2 * output)
    assert not memory.views(pipe, RandomNumbers())
    hook.remove()
    assert memory.views(pipe, RandomNumbers())


def test_a_pipeline_encodes_alike_with_views() -> None:
    pipe = tiny_pipeline("xl")
    memory, given = EncoderMemory(), ("a red ball", None, "cpu", 1, True, "sand")
    calls: list[int] = []
    part = next(pipe.text_encoder.children())
    original = part.forward
    part.forward = lambda *positional, **named: (calls.append(1), original(*positional, **named))[1]
    with torch.no_grad():
        wanted = pipe.encode_prompt(*given)
        views = memory.views(pipe, RandomNumbers())
        own = {name: getattr(pipe, name) for name in views}
        assert views.keys() == {"text_encoder", "text_encoder_2"} and len(calls) == 2
        vars(pipe).update(views)
        results = [pipe.encode_prompt(*given) for _ in range(2)]
        vars(pipe).update(own)
    assert len(calls) == 4, "the prompt and the negative one, once each"
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, wanted, strict=True))
