"""``python -m gconv.export`` as its user meets it: what it writes, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from gconv.export import main
from gconv.models.checkpoint import load, save
from gconv.models.zoo import create_model

ROOT = Path(__file__).resolve().parents[2]


class Result(NamedTuple):
    code: int | str | None
    out: str
    err: str


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    """``net.pt``, alone in the folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    save(create_model("gc-p4cnn", width=2), "net.pt")
    return Path("net.pt")


@pytest.fixture
def run(capsys, checkpoint):
    """The command: what it returns and prints."""

    def run(*argv: str) -> Result:
        try:
            code = main(argv)
        except SystemExit as exit_:
            code = exit_.code
        return Result(code, *capsys.readouterr())

    return run


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def says(result: Result, *parts: str) -> None:
    """It failed by the user's fault, and said so in one line on stderr and nothing on stdout."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("python -m gconv.export: error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


def test_without_options_it_writes_a_module_of_pytorch(run, checkpoint):
    code, out, err = run("net.pt")
    assert (code, err) == (0, "")
    assert files() == ["net-exported.pt", "net.pt"]
    assert out.startswith(f"written: net-exported.pt ({Path('net-exported.pt').stat().st_size:,} bytes); ")
    images = torch.rand(4, 1, 28, 28)
    plain = torch.load("net-exported.pt", weights_only=False)
    torch.testing.assert_close(plain(images), load(checkpoint)(images), rtol=1e-5, atol=1e-6)


def test_the_format_decides_the_ending_and_what_is_written(run, checkpoint):
    assert run("net.pt", "--format", "PT2").code == 0
    assert files() == ["net-exported.pt2", "net.pt"]
    images = torch.rand(4, 1, 28, 28)
    program = torch.export.load("net-exported.pt2").module()
    torch.testing.assert_close(program(images), load(checkpoint)(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_json_is_one_document_on_stdout(run, format):
    if format == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    code, out, err = run("net.pt", "--format", format, "--out", "sub/out", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document.pop("max_difference") < 1e-5
    assert document == {"file": "sub/out", "format": format, "bytes": Path("sub/out").stat().st_size}


def test_what_the_onnx_exporter_prints_is_not_on_stdout(run, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    exporter = torch.onnx.export

    def remarks(*arguments, **options):  # as onnxscript did before version 0.7
        print("Applied 2 of general pattern rewrite rules.")
        return exporter(*arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", remarks)
    code, out, err = run("net.pt", "--format", "onnx", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["format"] == "onnx"


def test_what_is_there_is_replaced_only_with_force(run):
    Path("out.pt").write_text("mine")
    says(run("net.pt", "--out", "out.pt"), "out.pt exists", "--force")
    assert Path("out.pt").read_text() == "mine"
    assert run("net.pt", "--out", "out.pt", "--force").code == 0
    assert Path("out.pt").stat().st_size > 1000


def test_the_checkpoint_is_never_replaced(run, checkpoint):
    before = checkpoint.read_bytes()
    says(run("net.pt", "--out", "./net.pt", "--force"), "net.pt is the checkpoint itself")
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("", "the following arguments are required: CKPT"),
        ("net.pt --format tensorflow", "unknown format 'tensorflow'; accepted: torch, pt2, onnx"),
        ("missing.pt", "missing.pt does not exist"),
        ("text.pt", "text.pt is damaged or cut off"),
        ("net.pt --out text.pt/out", "text.pt is not a directory"),
        ("net.pt --out . --force", "it is a directory"),
        ("net.pt --nofuse", "unrecognized arguments: --nofuse"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(run, arguments, part):
    Path("text.pt").write_text("no network")
    says(run(*arguments.split()), part)
    assert files() == ["net.pt", "text.pt"]


def test_missing_packages_are_said_before_anything_is_read(run, monkeypatch):
    monkeypatch.setattr("gconv.deploy.export_formats.find_spec", lambda name: None)
    result = run("missing.pt", "--format", "onnx")
    says(result, "needs onnx, onnxruntime, onnxscript", "pip install 'gconv-separable[export]'")


def test_a_wrong_file_is_our_failure_and_not_left(run, monkeypatch):
    monkeypatch.setattr("gconv.deploy.exporting.TOLERANCE", -1)
    with pytest.raises(RuntimeError, match="was not written"):
        run("net.pt")
    assert files() == ["net.pt"]


@pytest.mark.parametrize("argv", [["--help"], ["net.pt", "--format", "x"]], ids=["help", "mistake"])
def test_help_and_mistakes_do_not_wait_for_torch(argv):
    code = f"""
import sys
from gconv.export import main
try:
    code = main({argv})
finally:
    print(sorted({{"torch", "numpy", "onnx"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert ("examples:\n  python -m gconv.export " in done.stdout) == (argv == ["--help"])


def test_the_exit_code_reaches_the_shell(tmp_path):
    command = [sys.executable, "-m", "gconv.export", str(tmp_path / "missing.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
