"""The commands, run in this process with a tiny pipeline saved to a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fisedit_compile.cli.main import main
from fisedit_compile.cli.options import SchedulerName, check_arguments, parse_arguments, parse_size
from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import EditSession
from fisedit_compile.pipelines.families.schedulers import SCHEDULER_NAMES
from support.tiny_pipelines import HEIGHT, WIDTH, tiny_pipeline
from support.transformer_pipelines import with_text_encoders

SIZE = f"{HEIGHT}x{WIDTH}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(path, safe_serialization=True)
    return str(path)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as raised:
        main(words)
    code = raised.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("command", ["", "demo", "generate", "edit", "explain"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*filter(None, [command]), "--help") == 0
    assert "Usage" in capsys.readouterr().out


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "explain" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("fisedit 0.")


def test_help_does_not_import_torch() -> None:
    program = "import sys; from fisedit_compile.cli import main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nothing"], 2, "No such command"),
        (["edit", "--prompt", "a"], 2, "--base-prompt"),
        (["generate", "--prompt", "a", "--model", "/not/there"], 2, "neither"),
        (["generate", "--prompt", "a", "--steps", "0"], 2, "--steps"),
        (["generate", "--prompt", "a", "--size", "large"], 2, "--size"),
        (["generate", "--prompt", "a", "--scheduler", "ddpm"], 2, "--scheduler"),
        (["generate", "--prompt", "a", "--argument", "eta"], 2, "expected NAME=VALUE, got 'eta'"),
        (["generate", "--prompt", "a", "--argument", "width=16"], 2, "width is given by --size"),
        (["generate", "--prompt", "a", "--argument", "eta=1", "--argument", "eta=0"], 2, "eta is given twice"),
        (
            ["edit", "--base-prompt", "a", "--prompt", "b", "--mask", "/not/there.png"],
            2,
            "--mask: a mask may be the path",
        ),
        (
            ["edit", "--base-prompt", "a", "--prompt", "b", "--mask", __file__],
            2,
            "--mask: a mask is a picture that can be",
        ),
        (
            ["edit", "--base-prompt", "a", "--prompt", "b", "--mask", "m.png", "--white-threshold", "128"],
            2,
            "--white-threshold: white_threshold must be a number above 0 and up to 1, got 128.0",
        ),
        (["explain", "--model", "sd99"], 1, "sd15, sd21, sdxl, scenes"),
        (["explain", "--chip", "Z80"], 1, "unknown chip 'Z80'; expected one of T4"),
        (["explain", "--graph", "flow.png"], 1, "ending in one of .svg, .dot, .json"),
        (["explain", "--model", "scenes", "--size", "30x30"], 1, "multiple of 4"),
    ],
)
def test_errors_are_one_line(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == code
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and told.startswith("fisedit: error: ")


def test_a_folder_without_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--prompt", "a", "--model", str(tmp_path), "--device", "cpu") == 1
    assert "does not hold a pipeline" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_line_offers_the_sessions_schedulers() -> None:
    assert tuple(name.value for name in SchedulerName) == SCHEDULER_NAMES


def test_sizes() -> None:
    assert parse_size("512x768") == (512, 768) and parse_size(None) is None


def test_generate(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "picture.png"
    words = ["generate", "--prompt", "a red ball", "--model", folder, "--device", "cpu", "--steps", "2", "--size", SIZE]
    assert run(*words, "--output", str(path), "--scheduler", "heun") == 0
    assert Image.open(path).size == (WIDTH, HEIGHT)
    assert f"{WIDTH}x{HEIGHT} pixels" in capsys.readouterr().out


def test_other_arguments_reach_the_pipeline(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folder, "--device", "cpu", "--steps", "2", "--size", SIZE, "--scheduler", "ddim"]
    rescaled = ["--argument", "guidance_rescale=0.9"]
    for name, more in (("plain", []), ("rescaled", rescaled)):
        assert run("generate", "--prompt", "a red ball", *words, *more, "--output", str(tmp_path / f"{name}.png")) == 0
    folders = ["--prompt", "a blue box", "--output", str(tmp_path / "edit"), "--decoder", "dense"]
    assert run("edit", "--base-prompt", "a red ball", *folders, *words, *rescaled) == 0
    plain, given, base = (
        np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("plain.png", "rescaled.png", "edit/base.png")
    )
    assert np.abs(given - base).max() <= 1 < np.abs(given - plain).max()
    assert run("generate", "--prompt", "a", *words, "--argument", "guidance_rescail=1") == 1
    assert "has no argument guidance_rescail" in capsys.readouterr().err


def test_values_of_other_arguments() -> None:
    texts = ["a=1", "b = 0.5", "c=true", "d=[1, 2]", 'e="x=y"', "f=some words", "g=null", "h="]
    expected = {"a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": "x=y", "f": "some words", "g": None, "h": ""}
    assert parse_arguments(texts) == expected


def test_what_the_pipeline_refuses_is_one_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--prompt", "a", "--model", folder, "--device", "cpu", "--steps", "2", "--size", "17x16"]
    assert run(*words) == 1
    assert "the pipeline refused to run" in capsys.readouterr().err.splitlines()[-1]


def test_edit(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    painted = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    painted[4:10, 6:16] = 255
    Image.fromarray(painted).save(tmp_path / "painted.png")
    output = tmp_path / "edit"
    words = ["edit", "--base-prompt", "a red ball", "--prompt", "a blue box", "--mask", str(tmp_path / "painted.png")]
    words += ["--model", folder, "--device", "cpu", "--steps", "3", "--size", SIZE, "--output", str(output)]
    assert run(*words) == 0
    assert {path.name for path in output.iterdir()} == {"base.png", "mask.png", "edited.png", "report.json"}
    base, edited = (np.asarray(Image.open(output / name)) for name in ("base.png", "edited.png"))
    assert np.array_equal(base[painted == 0], edited[painted == 0]) and not np.array_equal(base, edited)
    report = json.loads((output / "report.json").read_text())
    assert report["edit"]["sparse_calls"] == 3 and report["base"]["dense_calls"] == 3
    assert "sparse steps" in capsys.readouterr().out


def test_settings_of_the_other_method_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("edit", "--base-prompt", "a red ball", "--prompt", "a blue box", "--mask-steps", "5") == 2
    assert "method='fisedit'" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_mask_of_another_shape_is_refused_before_anything_is_generated(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (HEIGHT, WIDTH), 255).save(tmp_path / "turned.png")
    words = ["edit", "--base-prompt", "a red ball", "--prompt", "a blue box", "--mask", str(tmp_path / "turned.png")]
    words += ["--model", folder, "--device", "cpu", "--steps", "2", "--output", str(tmp_path / "edit")]
    monkeypatch.setattr(EditSession, "generate", lambda *_, **__: pytest.fail("a picture is generated"))
    for size, cells in (["--size", SIZE], "8:12"), ([], "8:8"):
        assert run(*words, *size) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert f"expected a mask with the aspect ratio of the picture, {cells}" in told and "24x16" in told


def test_a_folder_with_a_transformer(tmp_path: Path) -> None:
    with_text_encoders().save_pretrained(tmp_path / "pipeline", safe_serialization=True)
    given = ["--model", str(tmp_path / "pipeline"), "--device", "cpu", "--steps", "2", "--size", "56x40"]
    picture, output = tmp_path / "picture.png", tmp_path / "edit"
    assert run("generate", "--prompt", "a red ball", *given, "--output", str(picture)) == 0
    Image.linear_gradient("L").point(lambda level: 255 * (level > 180)).resize((40, 56)).save(tmp_path / "mask.png")
    words = ["edit", "--base-prompt", "a red ball", "--prompt", "a blue box", "--mask", str(tmp_path / "mask.png")]
    assert run(*words, *given, "--decoder", "dense", "--output", str(output)) == 0
    paths = picture, output / "base.png", output / "edited.png"
    made, base, edited = (np.asarray(Image.open(path)) for path in paths)
    assert np.abs(made.astype(int) - base).max() <= 1 and np.array_equal(base[:28], edited[:28])
    assert not np.array_equal(base, edited)
    assert json.loads((output / "report.json").read_text())["edit"]["sparse_calls"] == 2


def test_what_the_pipeline_does_not_take() -> None:
    with pytest.raises(PipelineError, match="Silent has no argument guidance_scale, steps; leave it out"):
        check_arguments(Silent(), {"prompt": "a", "steps": 2, "guidance_scale": 1.0})


class Silent:
    def __call__(self, prompt: str) -> None: ...


def test_explain_reads_a_folders_configuration(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "--model", folder, "--size", "64x96") == 0
    text = capsys.readouterr().out
    assert "conv" in text and "Convolutions on" not in text


def test_explain_writes_the_graph(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "flow.json"
    assert run("explain", "--model", folder, "--size", "64x96", "--graph", str(path)) == 0
    assert f"graph in {path}" in capsys.readouterr().out
    names = {node["id"] for node in json.loads(path.read_text())["nodes"]}
    assert len(names) > 2 and all("x" in name or name in ("dense", "not spatial") for name in names)


def test_explain_shows_the_kernels_of_a_chip(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "--model", folder, "--size", "64x96", "--chip", "a100") == 0
    assert "Convolutions on A100 (8.0, 108 processors)" in capsys.readouterr().out
