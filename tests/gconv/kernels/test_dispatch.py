"""Which version of the kernel runs a layer, if any."""

import pytest
import torch

from gconv import FORMS, GROUPS, GConv2d, SeparableGConv2d, group
from gconv.functional.expansion import channels_last, from_group_major
from gconv.kernels.config import kernel_config
from gconv.kernels.dispatch import KERNELS, OVER_PIXELS, in_basis_pays, variants, variants_with
from gconv.kernels.library import INSTRUCTIONS, kernel_class, require_library
from gconv.system.errors import InputError
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


@pytest.mark.skipif(kernel_class() not in ("avx2", "avx512"), reason="full layers do not run in this kernel")
@pytest.mark.parametrize("form", FORMS)
def test_a_separable_layer_that_runs_dense_does_as_the_full_one(form):
    """Or a network converted to few parameters would be slower than its original."""
    torch.manual_seed(0)
    layer = SeparableGConv2d(11, 12, 3, padding=1, group="p4m", form=form, rank=2, execution="dense")
    assert layer.runs_in_irreps
    x = from_group_major(channels_last(torch.randn(2, 88, 6, 7)), 8)
    assert kernel_of_pass(layer, x) is kernel_of_pass(layer.to_dense(), x)
    assert as_defined(layer, x).shape == (2, 12, 8, 6, 7)
    small = SeparableGConv2d(4, 4, 3, group="p4", form=form, execution="dense")
    assert not small.runs_in_irreps
    assert kernel_of_pass(small, map_for(small)) is None


@pytest.mark.parametrize(
    ("lanes", "expected"),  # by the group: numbers of channels, and whether layers of so many run as mixes
    [
        (16, {"p4": {10: False, 16: True, 17: False, 32: True}, "p4m": {7: False, 8: True, 11: True, 23: True}}),
        (8, {"p4": {10: False, 12: True, 16: True}, "p4m": {6: False, 8: True, 11: True, 23: True}}),
        (4, {"p4": {128: False}, "p4m": {128: False}}),
        (None, {"p4": {128: False}, "p4m": {128: False}}),
    ],
)
@pytest.mark.parametrize("k", [3, 5, 7])
def test_full_layers_run_as_mixes_where_vectors_are_well_filled(monkeypatch, lanes, expected, k):
    monkeypatch.setattr("gconv.kernels.dispatch.variants", lambda: {} if lanes is None else {1: lanes})
    for on, layers in expected.items():
        for channels, runs in layers.items():
            assert GConv2d(channels, channels, k, group=on).runs_in_irreps == runs
    assert not GConv2d(100, 100, k, group="z2").runs_in_irreps


@built
def test_a_class_of_machines_chooses_as_the_versions_that_it_has():
    """So that costs can be told for other machines: the table of lanes is that of the compiled library."""
    functions = require_library().functions
    for at_most, name in enumerate(INSTRUCTIONS[: require_library().instructions + 1]):
        having = {n: lanes for n, lanes in variants().items() if functions["version_instructions"](n) <= at_most}
        for on in GROUPS:
            for channels in range(1, 40):
                for stride in (1, 2):
                    expected = in_basis_pays(group(on), channels, channels, stride, name)
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr("gconv.kernels.dispatch.variants", lambda having=having: having)
                        assert in_basis_pays(group(on), channels, channels, stride) == expected


def test_the_classes_of_machines_are_the_names_of_the_variable():
    assert ("none", *INSTRUCTIONS) == KERNELS
    assert kernel_class() == (kernel_config()["instructions"] or "none")
    assert variants_with("none") == {}
    with pytest.raises(InputError, match=r"^unknown kernel 'sse'; accepted: none, any, avx2, avx512$"):
        variants_with("sse")
