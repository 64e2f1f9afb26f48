"""Which version of the kernel runs a layer, if any."""

import pytest
import torch

from gconv import FORMS, GConv2d, SeparableGConv2d
from gconv.functional.expansion import channels_last, from_group_major
from gconv.kernels.dispatch import OVER_PIXELS, variants
from tests.gconv.kernels.comparing import as_defined, built, kernel_of_pass


def map_for(layer):
    """A small map in the layout that the kernel takes."""
    order = layer.group.order
    return from_group_major(channels_last(torch.randn(1, layer.in_channels * order, 5, 5)), order)


@pytest.mark.skipif(OVER_PIXELS not in variants(), reason="no AVX-512 here")
def test_the_version_over_pixels_is_for_few_channels():
    def version(channels, on="p4", **more):
        layer = SeparableGConv2d(channels, channels, 3, group=on, form="gc", **more)
        return kernel_of_pass(layer, map_for(layer)).variant

    assert version(10) == version(8, "p4m") == version(20, "pm") == OVER_PIXELS
    assert OVER_PIXELS not in (version(64), version(28, "p4m"), version(10, stride=2), version(12, rank=9))


@built
@pytest.mark.parametrize("form", FORMS)
def test_a_separable_layer_that_runs_dense_does_as_the_full_one(form):
    """Or a network converted to few parameters would be slower than its original."""
    torch.manual_seed(0)
    layer = SeparableGConv2d(8, 9, 3, padding=1, group="p4m", form=form, rank=2, execution="dense")
    assert layer.runs_in_irreps
    x = from_group_major(channels_last(torch.randn(2, 64, 6, 7)), 8)
    assert kernel_of_pass(layer, x) is kernel_of_pass(layer.to_dense(), x)
    assert as_defined(layer, x).shape == (2, 9, 8, 6, 7)
    small = SeparableGConv2d(4, 4, 3, group="p4", form=form, execution="dense")
    assert not small.runs_in_irreps
    assert kernel_of_pass(small, map_for(small)) is None


@built
def test_large_full_layers_run_so_and_small_ones_do_not():
    for on, small, large in (("p4", 26, 27), ("p4m", 7, 8)):
        assert not GConv2d(small, small, 3, group=on).runs_in_irreps
        assert GConv2d(large, large, 3, group=on).runs_in_irreps
    assert not GConv2d(100, 100, 3, group="z2").runs_in_irreps
