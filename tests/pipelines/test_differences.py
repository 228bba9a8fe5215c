"""Two values that differ are told apart by the message that shows both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.arguments import CallArguments, same_value
from fisedit_compile.pipelines.differences import told_apart
from fisedit_compile.pipelines.families.schedulers import scheduler_difference
from fisedit_compile.pipelines.families.stable_diffusion import STABLE_DIFFUSION


class Text:
    """Two of them look alike and are not equal."""

    def __repr__(self) -> str:
        return "Text"


def changed(value: Any, place: Any, new: Any) -> Any:
    copy = value.clone() if isinstance(value, torch.Tensor) else value.copy()
    copy[place] = new
    return copy


PICTURE = Image.new("RGB", (9, 7), (1, 2, 3))
DOTTED = PICTURE.copy()
DOTTED.putpixel((4, 2), (1, 9, 3))
LONG = list(range(300))


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (1, 2, ("1", "2")),
        (torch.zeros(3, 4), changed(torch.zeros(3, 4), (1, 2), 5), ("with 0.0 at [1, 2]", "with 5.0 at [1, 2]")),
        (np.zeros((3, 4)), changed(np.zeros((3, 4)), (2, 0), 5), ("with 0.0 at [2, 0]", "with 5.0 at [2, 0]")),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int32), ("type torch.float32", "type torch.int32")),
        (PICTURE, DOTTED, ("(1, 2, 3) at row 2 and column 4", "(1, 9, 3) at row 2 and column 4")),
        (PICTURE, PICTURE.convert("RGBA"), ("mode RGB", "mode RGBA")),
        (LONG, changed(LONG, 250, 0), ("with 250 as element 250", "with 0 as element 250")),
        ([torch.zeros(2000)], [changed(torch.zeros(2000), 999, 1)], ("0.0 at [999], as element 0", "1.0 at [999], as")),
        (
            {"a": LONG},
            {"a": changed(LONG, 299, -1)},
            ("299 as element 299, under 'a'", "-1 as element 299, under 'a'"),
        ),
        ("x" * 300 + "a", "x" * 300 + "b", ("'a' at character 300", "'b' at character 300")),
        (np.array(LONG * 5), changed(np.array(LONG * 5), 700, 1), ("with 100 at [700]", "with 1 at [700]")),
        (Text(), Text(), ("Text", "another Text")),
    ],
)
def test_what_looks_alike_is_told_apart(before: Any, now: Any, told: tuple[str, str]) -> None:
    texts = told_apart(before, now)
    assert texts[0] != texts[1]
    assert all(part in text for part, text in zip(told, texts, strict=True)), texts


values = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.text(max_size=200), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=30,
)


@given(values, values)
def test_any_two_values_are_told_apart(before: Any, now: Any) -> None:
    texts = told_apart(before, now)
    assert texts[0] != texts[1] or same_value(before, now)
    assert all(len(text) < 600 for text in texts)


def test_messages_of_a_session_use_it() -> None:
    class Pipe:
        def __call__(
            self, prompt: str, sigmas: Any = None, guidance_scale: float = 1.0, callback: Any = None
        ) -> None: ...

    arguments = CallArguments(Pipe(), STABLE_DIFFUSION)
    sigmas = torch.ones(40)
    with pytest.raises(
        PipelineError, match=r"sigmas was .* with 1.0 at \[30\] .* cannot be .* with 0.5 at \[30\] in an"
    ):
        arguments.merge({"prompt": "a", "sigmas": sigmas}, {"sigmas": changed(sigmas, 30, 0.5)})
    betas = np.linspace(0, 1, 2000)
    settings = [("DDIM", {"trained_betas": one}) for one in (betas, changed(betas, 1500, 7.0))]
    assert "with 7.0 at [1500]" in str(scheduler_difference(*settings))


def test_dictionaries_are_compared_by_content() -> None:
    left, right = {"scale": torch.ones(2)}, {"scale": torch.ones(2)}
    assert same_value(left, right) and not same_value(left, {"scale": torch.zeros(2)}) and not same_value(left, {})
