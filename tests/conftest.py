"""Every run draws the same examples and the same random tensors, and Ctrl-C interrupts in every run."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import register_random, settings


class TorchRandom:
    """PyTorch's generator as hypothesis wants it, so that each example starts from the same seed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()
register_random(TORCH_RANDOM)

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _sigint_interrupts() -> Iterator[None]:
    """Even where the suite was started with SIGINT ignored, as a shell starts it in the background."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def precision() -> Iterator[dict[str, Any]]:
    """PyTorch's settings of the precision of float32, by the names below."""
    b = torch.backends
    owners = {"all": b, "cudnn": b.cudnn, "conv": b.cudnn.conv, "rnn": b.cudnn.rnn, "matmul": b.cuda.matmul}
    before = {name: owner.fp32_precision for name, owner in owners.items()}
    yield owners
    b.cudnn.allow_tf32 = True
    for name, owner in owners.items():
        owner.fp32_precision = before[name]
    assert b.cudnn.allow_tf32  # both interfaces agree again
