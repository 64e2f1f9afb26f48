"""The device of a name, and the environment that a record tells."""

from __future__ import annotations

import json

import pytest
import torch

from gconv.system.errors import InputError
from gconv.training.device import environment, pick_device


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="unknown device 'tpu'; accepted: auto, cpu, cuda"):
        pick_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told():
    with pytest.raises(InputError, match="no GPU is available"):
        pick_device("cuda")


def test_the_environment_is_plain_data():
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older interface only")
@pytest.mark.parametrize(("conv", "rnn", "tf32"), [("ieee", "tf32", False), ("tf32", "ieee", True)])
def test_the_environment_on_a_gpu_tells_tf32_as_set_by_the_newer_interface(monkeypatch, precision, conv, rnn, tf32):
    """With these settings, reading ``torch.backends.cudnn.allow_tf32`` raises an error."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    precision["conv"].fp32_precision = conv
    precision["rnn"].fp32_precision = rnn
    assert environment(torch.device("cuda"))["tf32"] is tf32
