"""InvariantMemo: results are kept for as long as the inputs are the same, and never longer."""

from __future__ import annotations

import torch

from fisedit_compile.executing.prologues import PROMPTS, InvariantMemo


class Counter:
    """Doubles its input and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, memo: InvariantMemo, *inputs):
        def compute():
            self.count += 1
            return [inputs[0] * 2]

        (result,) = memo.get(inputs, compute)
        assert torch.equal(result, inputs[0] * 2)
        return self.count


def test_the_same_content_is_computed_once() -> None:
    memo, run = InvariantMemo(), Counter()
    prompt = torch.randn(2, 3)
    assert [run(memo, prompt), run(memo, prompt), run(memo, prompt.clone())] == [1, 1, 1]


def test_other_content_is_computed_anew() -> None:
    memo, run = InvariantMemo(), Counter()
    prompt = torch.randn(2, 3)
    assert run(memo, prompt) == 1
    prompt[0, 0] += 1  # in place: the same tensor, other content
    assert run(memo, prompt) == 2
    assert run(memo, prompt.double()) == 3 and run(memo, prompt[:1]) == 4


def test_an_inference_tensor_changed_in_place_is_computed_anew() -> None:
    memo, run = InvariantMemo(), Counter()
    with torch.inference_mode():
        prompt = torch.randn(2, 3)
        assert run(memo, prompt) == 1
        prompt[0, 0] += 1
        assert run(memo, prompt) == 2


def test_numbers_are_compared_with_their_types() -> None:
    memo, run = InvariantMemo(), Counter()
    prompt = torch.randn(2)
    assert [run(memo, prompt, 1), run(memo, prompt, 1), run(memo, prompt, 1.0), run(memo, prompt, 2)] == [1, 1, 2, 3]


def test_several_prompts_take_turns() -> None:
    memo, run = InvariantMemo(), Counter()
    prompts = [torch.randn(2) for _ in range(PROMPTS)]
    for _ in range(2):
        for prompt in prompts:
            run(memo, prompt)
    assert run.count == PROMPTS
    run(memo, torch.randn(2))
    run(memo, prompts[0])
    assert run.count == PROMPTS + 2, "the oldest is forgotten first"


def test_on_other_devices_it_must_be_the_very_tensor() -> None:
    memo, prompt = InvariantMemo(), torch.empty(2, 3, device="meta")
    count = []

    def compute():
        count.append(1)
        return []

    memo.get([prompt], compute)
    memo.get([prompt], compute)
    assert len(count) == 1
    memo.get([torch.empty(2, 3, device="meta")], compute)
    assert len(count) == 2
    prompt.add_(1)
    memo.get([prompt], compute)
    assert len(count) == 3
