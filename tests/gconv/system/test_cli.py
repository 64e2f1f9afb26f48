"""What the command lines share: one line for a mistake, and honest exit codes."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch  # noqa: F401  # so that it is there, as in a notebook

from gconv.system.cli import Parser, loading, main_args, number, run
from gconv.system.errors import InputError, one_of


@pytest.fixture
def parser() -> Parser:
    p = Parser("prog", "First line.\n\nSecond\nparagraph.", "  prog --count 3\n  prog --help")
    p.add_argument("--count", type=number(int, 1, 9))
    return p


def test_help_keeps_its_lines_and_ends_with_the_examples(parser):
    text = parser.format_help()
    assert "\nFirst line.\n\nSecond\nparagraph.\n" in text
    assert text.endswith("examples:\n  prog --count 3\n  prog --help\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "x"], "argument --count: 'x' is not a whole number from 1 to 9"),
        (["--count"], "argument --count: expected one argument"),
        (["--cou", "3"], "unrecognized arguments: --cou 3"),
        (["extra"], "unrecognized arguments: extra"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(parser, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    assert caught.value.code == 2
    assert tuple(capsys.readouterr()) == ("", f"prog: error: {message}\n")


def test_run_done(capsys):
    done = []
    assert run("prog", lambda: done.append(True)) == 0
    assert done == [True]
    assert tuple(capsys.readouterr()) == ("", "")


def test_run_tells_the_users_mistake_in_one_line(capsys):
    def command() -> None:
        raise InputError("first\n   second\tthird")

    assert run("prog", command) == 2
    assert tuple(capsys.readouterr()) == ("", "prog: error: first second third\n")


def test_run_interrupted(capsys):
    def command() -> None:
        raise KeyboardInterrupt

    assert run("prog", command) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "interrupted" in err


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
def test_run_hides_no_failure_of_ours(error):
    def command() -> None:
        raise error("ours")

    with pytest.raises(error, match="ours"):
        run("prog", command)


def test_the_collector_of_a_process_that_has_pytorch_is_left_alone():
    frozen = gc.get_freeze_count()
    with loading():
        assert gc.isenabled()
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, frozen)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_while_a_command_loads_and_then_passes_over_what_was_loaded(enabled):
    code = f"""
import gc
from gconv.system.cli import loading
if not {enabled}: gc.disable()
try:
    with loading():
        print(gc.isenabled(), gc.get_freeze_count())
        made = [[] for _ in range(1000)]
        raise ImportError
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"False 0\n{enabled} True\n", "")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("gconv.train", ["rotdigits", "--resume", "missing.pt"]),
        ("gconv.export", ["missing.pt"]),
        ("gconv.catalog", ["missing.pt"]),
        ("analysis.decompose", ["missing.pt"]),
        ("analysis.redundancy", ["missing.pt"]),
        ("analysis.sweep.__main__", ["missing.pt"]),
    ],
)
def test_every_command_loads_pytorch_that_way(command, arguments, tmp_path):
    code = (
        f"import gc, sys; from {command} import main; code = main({arguments})\n"
        "print(code, 'torch' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 50_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 True True True\n", done.stderr


@pytest.mark.parametrize(
    ("kind", "low", "high", "text", "value"),
    [
        (int, 1, 9, "1", 1),
        (int, 1, 9, "9", 9),
        (float, 0, 1, "0", 0.0),
        (float, 0, 1, "1e-3", 1e-3),
        (int, 0, None, "7", 7),
    ],
)
def test_numbers_within_their_range(kind, low, high, text, value):
    parsed = (number(kind, low) if high is None else number(kind, low, high))(text)
    assert parsed == value
    assert type(parsed) is kind


COMMANDS = {
    "gconv.train": ["rotdigits"],
    "gconv.experiments.__main__": ["rotmnist"],
    "gconv.export": ["a.pt"],
    "gconv.catalog": ["a.pt"],
    "gconv.info": [],
    "analysis.decompose": ["a.pt"],
    "analysis.redundancy": ["a.pt"],
    "analysis.sweep.__main__": ["a.pt"],
}
"""The module of every command, and the arguments that it cannot do without."""


def whole_number_options(command: str) -> list[str]:
    """The options of a command that take a whole number, tried one by one."""
    parser, found = import_module(command).parser(), []
    for option in sorted(set(re.findall(r"--[a-z][a-z-]*", parser.format_usage()))):
        try:
            args = vars(parser.parse_args([*COMMANDS[command], option, "3"]))
        except SystemExit:  # a switch, or not a number
            continue
        value = args[option.removeprefix("--").replace("-", "_")]
        found += [option] if isinstance(value, int) else []
    return found


@pytest.mark.parametrize("text", ["99999999999999999999999", "9" * 5000])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_a_whole_number_that_fits_no_integer(command, text, capsys):
    """As a seed, it would be a traceback from deep inside."""
    options = whole_number_options(command)
    assert options or command in ("gconv.export", "gconv.catalog", "gconv.info")
    capsys.readouterr()
    for option in options:
        with pytest.raises(SystemExit) as caught:
            import_module(command).main([*COMMANDS[command], option, text])
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"error: argument {option}: '{text}' is " in err


def test_every_command_is_tried():
    """Also those that are added."""
    root = Path(__file__).resolve().parents[3]
    modules = [path for package in ("gconv", "analysis") for path in (root / package).rglob("*.py")]
    found = {
        ".".join(path.relative_to(root).with_suffix("").parts) for path in modules if "main_args(" in path.read_text()
    }
    assert found - {"gconv.system.cli"} == set(COMMANDS)


@pytest.mark.parametrize("text", ["0", "10", "1.5", "nan", "", "two", "1e1"])
def test_whole_numbers_outside_are_refused(text):
    with pytest.raises(Exception, match=f"^'{text}' is not a whole number from 1 to 9$"):
        number(int, 1, 9)(text)


@pytest.mark.parametrize("text", ["-0.1", "nan", "inf", "-inf", "1e999", "", "1,5"])
def test_real_numbers_outside_are_refused(text):
    with pytest.raises(Exception, match=f"^'{text}' is not a number of at least 0$"):
        number(float, 0)(text)


def test_arguments_come_from_the_process_unless_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["prog", "a", "b"])
    assert main_args(None) == ["a", "b"]
    assert main_args([]) == []


def test_a_wrong_name_lists_the_right_ones():
    error = one_of("form", "x", ("g", "gc"))
    assert isinstance(error, InputError)
    assert isinstance(error, ValueError)
    assert str(error) == "unknown form 'x'; accepted: g, gc"
