"""Loading the compiled library, and what is done without it."""

from types import SimpleNamespace

import pytest
import torch

from gconv import GroupBatchNorm2d, SeparableGConv2d
from gconv.functional.expansion import channels_last, from_group_major
from gconv.kernels import library
from tests.gconv.kernels.comparing import built, forms, kernel_of_pass


def test_a_library_that_cannot_be_loaded_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert library.library.__wrapped__() is None
    (tmp_path / f"_compiled{library.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert library.library.__wrapped__() is None


@built
def test_function_transforms_and_derivatives_along_work():
    layer = SeparableGConv2d(2, 3, 3, group="p4", form="gc").eval()
    norm = GroupBatchNorm2d(3).eval()
    x = from_group_major(channels_last(torch.randn(2, 8, 5, 5)), 4)
    direction = torch.randn_like(x)

    def run(x):
        return norm(layer(x))

    with torch.no_grad():
        expected = run(x)
        each = torch.func.vmap(lambda one: run(one[None])[0])(x.contiguous())
        torch.testing.assert_close(each, expected)
        shift = (run(x + 1e-2 * direction) - run(x - 1e-2 * direction)) / 2e-2
    y, along = torch.func.jvp(run, (x,), (direction,))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(along, shift, rtol=1e-3, atol=1e-3)


@forms
def test_without_a_compiler_all_is_as_before(only, monkeypatch, form):
    layer = SeparableGConv2d(2, 3, 3, group="p4", form=form, execution="irrep")
    norm = GroupBatchNorm2d(3)
    x = from_group_major(channels_last(torch.randn(2, 8, 5, 5)), 4)
    with_it = [norm.train(mode)(layer(x)) for mode in (True, False)]
    only(None)
    norm.reset_running_stats()
    assert kernel_of_pass(layer, x) is None
    for now, before in zip([norm.train(mode)(layer(x)) for mode in (True, False)], with_it, strict=True):
        torch.testing.assert_close(now, before)
    assert SeparableGConv2d(9, 9, 3, group="p4m", form=form).execution == "factorized"


@built
def test_no_memory_is_said(monkeypatch):
    layer = SeparableGConv2d(4, 5, 3, group="p4").eval()
    x = from_group_major(channels_last(torch.randn(2, 16, 6, 6)), 4)
    kernel = kernel_of_pass(layer, x)
    monkeypatch.setattr(library, "require_library", lambda: SimpleNamespace(gconv_forward=lambda *_: 1))
    with pytest.raises(MemoryError, match="gconv::forward"):
        kernel.forward(x, torch.zeros(1))
