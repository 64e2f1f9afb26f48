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
