"""Options of the backend: which are refused, and what they switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from fisedit_compile import backend
from fisedit_compile import options as config
from fisedit_compile.errors import OptionError, ScalarMismatchError
from fisedit_compile.options import parse_options
from fisedit_compile.runtime import Runtime


def picture() -> torch.Tensor:
    return torch.randn(1, 3, 13, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"speed": 11}}, "unknown option 'speed'; valid options are runtime, norm, lowering"),
        ({"options": {"lowering": "fast"}}, "lowering must be one of plain, inductor"),
        ({"options": {"runtime": "mine"}}, "runtime must be a fisedit_compile.Runtime, got a str"),
        ({"options": {"disable_passes": "verify"}}, "cannot disable verify"),
        ({"options": {"packing": "lots"}}, "option packing must be a positive number of bytes"),
        ({"options": {"packing": -1}}, "option packing must be a positive number of bytes"),
        ({"options": {"cuda_graphs": 1}}, "option cuda_graphs must be True or False, got 1"),
        ({"options": {"content": "guidance"}}, "option content must be a list of names of inputs, got 'guidance'"),
        ({"options": {"convolution": "fast"}}, "must be one of auto, rows, tiles, dense, got 'fast'"),
        ({"mode": "fastest"}, "unknown mode 'fastest'; valid modes are default"),
    ],
)
def test_wrong_options(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        backend.fisedit(fx.symbolic_trace(lambda x: (x + 1,)), [picture()], **settings)


@pytest.mark.parametrize(
    ("given", "limit", "every"),
    [({}, 77, False), ({"packing": "auto"}, 77, False), ({"packing": True}, None, True)]
    + [({"packing": False}, 0, False), ({"packing": "1KB"}, 1000, False)],
)
def test_what_is_packed(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], limit: int | None, every: bool) -> None:
    monkeypatch.setattr(config, "packing_limit", lambda: 77)
    _, options = parse_options(None, given)
    assert (options.packing, options.pack_all) == (limit, every)


@pytest.mark.parametrize(
    ("pages", "container", "limit"),
    [(1000, None, 1_024_000), (1000, "max\n", 1_024_000), (1000, "4000\n", 1000), (1000, "8192000", 1_024_000)]
    + [(-1, None, None), (None, None, None)],
)
def test_a_quarter_of_the_memory_may_be_packed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pages: int | None, container: str | None, limit: int | None
) -> None:
    def sysconf(name: str) -> int:
        if pages is None:
            raise ValueError("unrecognized configuration name")
        return {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}[name]

    monkeypatch.setattr(config.os, "sysconf", sysconf)
    monkeypatch.setattr(config, "CONTAINER_LIMIT", tmp_path / "memory.max")
    if container is not None:
        (tmp_path / "memory.max").write_text(container)
    monkeypatch.setattr(config, "machine_memory", config.machine_memory.__wrapped__)
    assert config.packing_limit() == limit


@pytest.mark.parametrize(
    ("settings", "captured"),
    [
        ({}, True),
        ({"options": {"cuda_graphs": False}}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
    ],
)
def test_launches_are_captured_unless_switched_off(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], captured: bool
) -> None:
    asked: list[list[torch.device]] = []
    monkeypatch.setattr(backend, "capturer_for", asked.append)
    compiled = backend.fisedit(fx.symbolic_trace(lambda x: (x + 1,)), [picture()], **settings)
    assert compiled.executable.program is not None
    assert asked == ([[torch.device("cpu")]] if captured else [])


def test_numbers_that_are_content_may_change() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
            return x * torch.sin(time) * guidance.view(-1, 1, 1, 1)

    x, time, first, second = picture(), torch.tensor(0.5), torch.tensor([2.0]), torch.tensor([3.0])
    mask = torch.zeros(13, 9)
    mask[4:9, 2:5] = 1
    for content in ([], ["guidance"]):
        runtime = Runtime()
        network = torch.compile(Scaled(), backend="fisedit", options={"runtime": runtime, "content": content})
        with runtime.record("base"):
            base = network(x, time, first)
        with pytest.raises(ScalarMismatchError), runtime.edit("base", mask=mask):
            network(x, time + 1, first)
        if not content:
            with pytest.raises(ScalarMismatchError), runtime.edit("base", mask=mask):
                network(x, time, second)
            continue
        with runtime.edit("base", mask=mask):
            edited = network(x, time, second)
        assert torch.equal(edited, torch.where(mask > 0, Scaled()(x, time, second), base))


@pytest.mark.parametrize("devices", [(), ("cpu",), ("meta",), ("cuda",), ("cpu", "cuda")])
@pytest.mark.parametrize("mode", [None, *config.MODES])
def test_modes_choose_a_lowering_by_the_device(mode: str | None, devices: tuple[str, ...]) -> None:
    _, options = parse_options(mode, {}, devices)
    compiled = "cuda" in devices and mode is not None and mode.startswith("max-autotune")
    assert options.lowering == ("inductor" if compiled else "plain")
    for lowering in config.LOWERINGS:
        assert parse_options(mode, {"lowering": lowering}, devices)[1].lowering == lowering
