"""How work is split among threads: in balance for any number of them, whatever this machine has."""

from __future__ import annotations

import ctypes

import pytest
import torch

from gconv import SeparableGConv2d, group
from gconv.functional.expansion import channels_last, from_group_major
from gconv.kernels import library
from gconv.kernels.dispatch import OVER_PIXELS, Sizes, variants
from gconv.kernels.library import GRAIN, require_library
from gconv.kernels.separable_conv import layer_on, new_kernel
from tests.gconv.kernels.comparing import built, close, fine_grained, kernel_of_pass, on_threads, versions

threads_of = pytest.mark.parametrize("threads", [4, 8, 16, 64])
MANY = 64


def layer_of(channels, height, width, *, k=3, stride=1, form="gc"):
    """A p4m layer as the compiled functions take it, and the number of its version."""
    sizes = Sizes(8, channels, channels, 1, form == "gc_in", k, stride, k // 2, 1)
    number, lanes = next((number, lanes) for number, lanes in variants().items() if number != OVER_PIXELS)
    kernel = new_kernel(group("p4m"), sizes, True, True, number, lanes)
    return kernel, number, layer_on(kernel, height, width)


def workers(layer, n, threads, backward):
    _, number, shared = layer
    return require_library().functions["workers"](number, shared, n, threads, backward)


def shares(layer, n, count, backward):
    """The rows of each worker, numbered through all images."""
    begin, end = ctypes.c_size_t(), ctypes.c_size_t()
    for worker in range(count):
        require_library().functions["rows"](layer[2], n, count, worker, backward, begin, end)
        yield range(begin.value, end.value)


def rows_touched(rows, height, k):
    """The rows that a worker computes for its share: beside its own those that a spatial kernel reaches beyond it."""
    images = {row // height for row in rows}
    inner = (rows.start % height != 0) + (rows.stop % height != 0)
    return len(rows) + inner * (k - 1) // 2 * (len(images) > 0)


@built
@threads_of
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("n", [1, 3, 32, 100])
@pytest.mark.parametrize("size", [14, 28, 64])
def test_the_shares_are_in_balance_and_each_row_is_in_one(threads, backward, n, size):
    layer = layer_of(MANY, size, size)
    count = workers(layer, n, threads, backward)
    assert count == min(threads, n * size)  # all of them have enough to do
    split = list(shares(layer, n, count, backward))
    assert [row for rows in split for row in rows] == list(range(n * size))
    assert max(map(len, split)) - min(map(len, split)) <= 1
    touched = [rows_touched(rows, size, 3) for rows in split]
    assert max(touched) <= 1.15 * sum(touched) / count + 2


@built
@threads_of
@pytest.mark.parametrize("backward", [False, True])
def test_small_maps_take_fewer_threads(threads, backward):
    """No thread is woken for less than a grain, and no more are used for a larger map than there are."""
    macs = 8 * 8 * (12 / 64 * 64) + 8 * 9 * 8  # of a position of the p4m layer below, in irreducible representations
    for size in (4, 8, 16, 32, 64, 128):
        count = workers(layer_of(8, size, size), 1, threads, backward)
        whole = size * size * macs * (3 if backward else 1) / GRAIN
        assert count == max(1, min(threads, size, int(whole)))


@built
@threads_of
def test_gradients_of_large_filters_take_bounded_memory(threads):
    layer = layer_of(256, 7, 7)
    kernel = layer[0]
    values = kernel.weights + kernel.spatial_values + kernel.biases
    for n in (8, 64):
        maps = 2 * n * 8 * 256 * 7 * 7
        count = workers(layer, n, threads, True)
        assert count == min(threads, max(2**23, maps) // values)
        assert 4 * count * values <= max(2**25, 4 * maps)


@built
@versions
@pytest.mark.parametrize("form", ["gc", "gc_in"])
@pytest.mark.parametrize("number", [2, 3, 5, 8, 13])
@fine_grained()
def test_any_number_of_threads_gives_the_same_map_and_close_gradients(only, version, form, number):
    only(version)
    k, stride = (3, 1) if version == OVER_PIXELS else (5, 2)
    layer = SeparableGConv2d(5, 6, k, stride=stride, padding=1, group="p4", form=form, rank=2)
    x = from_group_major(channels_last(torch.randn(3, 20, 11, 9)), 4).requires_grad_()
    kernel = kernel_of_pass(layer, x)
    assert kernel.variant == version
    shared = layer_on(kernel, 11, 9)
    for backward in (0, 1):
        assert require_library().functions["workers"](version, shared, 3, number, backward) == number
    found = []
    for threads in (1, number, number):
        with on_threads(threads):
            y = layer(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    one, several, again = found
    assert torch.equal(one[0], several[0])
    assert torch.equal(one[1], several[1])  # the gradient of the map
    for alone, together, repeated in zip(one, several, again, strict=True):
        assert torch.equal(together, repeated)
        assert close(together, alone)


@built
def test_without_openmp_the_calling_thread_does_all(monkeypatch):
    monkeypatch.setattr(library, "openmp_functions", lambda: None)
    try:
        alone = library.load(library.PATH)
        assert not alone.threaded
        monkeypatch.setattr(library, "library", lambda: alone)
        layer = SeparableGConv2d(20, 20, 3, padding=1, group="p4m").eval()
        x = from_group_major(channels_last(torch.randn(2, 160, 20, 20)), 8)
        with torch.no_grad():
            assert library.threads() == 1
            y = layer(x)
    finally:
        monkeypatch.undo()
        library.load(library.PATH)  # the functions are the library's, not the Python object's
    with torch.no_grad():
        assert torch.equal(layer(x), y)
