"""What is told of the kernels, as data and as text."""

import json
import platform

import pytest
import torch

import gconv
from gconv.kernels import config, library
from gconv.kernels.config import configuration, kernel_config, show_config
from gconv.kernels.library import INSTRUCTIONS, Found, Library
from gconv.training.device import environment
from tests.gconv.kernels.comparing import built

AVX2 = Library({}, INSTRUCTIONS, INSTRUCTIONS.index("avx2"), True)


def shown(capsys):
    show_config()
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split("  ", 1) for line in lines)


@pytest.fixture
def found(monkeypatch):
    def found(*what):
        monkeypatch.setattr(config, "find_library", lambda: Found(*what))

    return found


def test_versions_and_machine_are_those_that_run():
    known = configuration()
    assert known["gconv"] == gconv.__version__
    assert known["python"] == platform.python_version()
    assert known["torch"] == str(torch.__version__)
    assert known["platform"].endswith(platform.machine())
    assert json.loads(json.dumps(known)) == known


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ((AVX2,), {"used": True, "instructions": "avx2", "threads": 3, "why_not": None}),
        ((AVX2._replace(threaded=False),), {"used": True, "instructions": "avx2", "threads": 1, "why_not": None}),
        ((None, "it rained"), {"used": False, "instructions": None, "threads": 1, "why_not": "it rained"}),
    ],
)
def test_what_runs_is_told_and_records_keep_it(monkeypatch, capsys, found, what, told):
    found(*what)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert kernel_config() == told == environment(torch.device("cpu"))["kernel"] == configuration()["kernel"]
    text = shown(capsys)
    used = text["compiled kernels"].strip()
    assert used == ("used" if told["used"] else "not used: it rained")
    if told["used"]:
        assert "avx2 (this processor has any, avx2, avx512)" in text["instructions"]
        assert text["kernel threads"].strip() == (
            "3, those of PyTorch" if told["threads"] == 3 else "1: PyTorch has no OpenMP"
        )


@built
def test_the_kernel_is_said_to_be_used_where_it_is(capsys):
    assert kernel_config()["used"]
    assert shown(capsys)["library"].strip() == str(library.PATH)


def test_it_is_a_public_name():
    assert gconv.show_config is show_config
