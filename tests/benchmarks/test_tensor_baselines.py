"""Generic tensor decompositions of expanded filters: what they compute, what they cost and what they break."""

from itertools import pairwise

import pytest
import tensorly
import torch
import torch.nn.functional as F
from torch import nn

import gconv
from analysis.fitting.bn_recalibration import reestimate_batchnorm
from benchmarks import tensor_baselines
from benchmarks.tensor_baselines import (
    KINDS,
    at_macs,
    at_parameters,
    cp,
    cp_factors,
    expanded_filter,
    fractions,
    largest_fraction,
    ranks_at,
    tucker2,
)
from gconv.functional.expansion import to_planar
from gconv.models.cost import cost

SHAPE = (1, 28, 28)
SAMPLINGS = [{"stride": 1}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2, "bias": False}]


@pytest.fixture
def network():
    """Width 3, so 12 channels to a generic kit; batch norm fits the data, or little would reach the class scores."""
    model = gconv.create_model("p4cnn", width=3).double().eval()
    x = torch.randn(16, *SHAPE).double()
    reestimate_batchnorm(model, x)
    assert model(x).std(0).min() > 1e-3
    return model


@pytest.fixture
def _hasty(monkeypatch):
    """For tests that ask what a network costs, not how well it fits."""
    monkeypatch.setattr(tensor_baselines, "ITERATIONS", 2)


def layer(group="p4", channels=(2, 3), k=3, **settings):
    return gconv.GConv2d(*channels, k, group=group, dtype=torch.float64, **settings)


def images(of, size=(9, 7)):
    """A map that is not square, so that the two axes of a kernel cannot be confused."""
    return torch.randn(2, of.in_channels, of.group.order, *size).double()


def relative(value, reference):
    assert value.shape == reference.shape
    return ((value - reference).norm() / reference.norm()).item()


def compressed_at(model, kind, fraction):
    ranks = ranks_at(model, kind, fraction)
    return tucker2(model, ranks) if kind == "tucker2" else cp(model, {name: r for name, (r,) in ranks.items()})


def test_tucker_at_full_rank_is_the_network(network):
    x = torch.randn(2, *SHAPE).double()
    compressed = tucker2(network, (12, 12))
    assert relative(compressed(x), network(x)) < 1e-10
    assert gconv.equivariance_error(compressed, "p4", x).max < 1e-10


def test_strided_padded_network_at_full_rank_keeps_its_1x1_layers():
    model = gconv.create_model("p4m-resnet44", width=1).double().eval()
    x = torch.randn(1, 3, 32, 32).double()
    compressed = tucker2(model, (32, 32))
    assert relative(compressed(x), model(x)) < 1e-10
    remaining = [m.kernel_size for m in compressed.modules() if isinstance(m, gconv.GConv2d)]
    assert remaining == [(1, 1)] * 2


def test_truncation_breaks_equivariance(network):
    x = torch.randn(2, *SHAPE).double()
    assert gconv.equivariance_error(network, "p4", x).max < 1e-10
    for compressed in (tucker2(network, (5, 5)), cp(network, 8)):
        reestimate_batchnorm(compressed, x)
        assert gconv.equivariance_error(compressed, "p4", x).max > 1e-3


@pytest.mark.parametrize("mode", [0, 1])
def test_tucker_is_equivariant_where_it_cuts_no_multiplet(mode):
    """The unfoldings commute with the regular representation, so their singular values come in multiplets."""
    full = layer(channels=(3, 3))
    singular = torch.linalg.svdvals(expanded_filter(full).movedim(mode, 0).flatten(1))
    seen = set()
    for rank in range(1, 13):
        ranks = (12, rank) if mode == 0 else (rank, 12)
        compressed = tucker2(nn.Sequential(full), {"0": ranks})
        cuts = rank < 12 and singular[rank - 1] / singular[rank] < 1 + 1e-6
        error = gconv.equivariance_error(compressed, "p4", images(full, (7, 7))).max
        assert error > 1e-6 if cuts else error < 1e-10
        seen.add(bool(cuts))
    assert seen == {True, False}


@pytest.mark.parametrize("settings", SAMPLINGS)
@pytest.mark.parametrize("group", ["p4", "p4m"])
def test_tucker_layer_is_the_convolution_with_the_best_filter_of_its_rank(group, settings):
    full = layer(group, **settings)
    filter, s = expanded_filter(full), full.group.order
    (chain,) = tucker2(nn.Sequential(full), (2 * s, 5))
    first, core, last = (conv.weight for conv in chain.convs)
    assert (first.shape[0], last.shape[1]) == (2 * s, 5)
    rebuilt = torch.einsum("ox,xykl,yi->oikl", last[..., 0, 0], core, first[..., 0, 0])
    tail = torch.linalg.svdvals(filter.flatten(1))[5:].norm()
    assert (rebuilt - filter).norm().item() == pytest.approx(tail.item(), rel=1e-6)
    check_chain(chain, full, rebuilt)


@pytest.mark.parametrize("settings", SAMPLINGS)
@pytest.mark.parametrize("group", ["p4", "p4m"])
def test_cp_layer_is_the_convolution_with_the_rebuilt_filter(group, settings):
    full = layer(group, k=4, **settings)
    factors = cp_factors(expanded_filter(full), 6)
    (chain,) = cp(nn.Sequential(full), 6)
    assert [conv.groups for conv in chain.convs] == [1, 6, 6, 1]
    rebuilt = torch.from_numpy(tensorly.cp_to_tensor((None, [factor.numpy() for factor in factors])))
    check_chain(chain, full, rebuilt)
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    torch.testing.assert_close(norms, norms[:1].expand(4, -1))


def check_chain(chain, full, filter):
    """The chain's output is that of one ordinary convolution, and the bias and shape are those of the full layer."""
    x, s = images(full), full.group.order
    bias = None if full.bias is None else full.bias.repeat_interleave(s)
    y = F.conv2d(to_planar(x), filter, bias, *full.sampling).unflatten(1, (full.out_channels, s))
    assert relative(chain(x), y) < 1e-10
    assert y.shape == full(x).shape
    assert all(conv.bias is None for conv in chain.convs[:-1])


def test_cp_fits():
    """Exact at the largest rank, worse with each one taken away; and a filter of rank 1 needs no more than that."""
    full = layer(channels=(1, 2))
    x = images(full)
    errors = [relative(cp(nn.Sequential(full), rank)(x), full(x)) for rank in (2, 8, 36)]
    assert errors[0] > errors[1] > 1e-2
    assert errors[2] < 1e-5
    nn.init.constant_(full.weight, 0.3)
    for compressed in (cp(nn.Sequential(full), 1), cp(nn.Sequential(full), 3), tucker2(nn.Sequential(full), (1, 1))):
        assert relative(compressed(x), full(x)) < 1e-6


def test_parameters_of_both_kinds(network):
    rest = sum(p.numel() for n, p in network.named_parameters() if n.startswith(("conv1", "bn", "fc")))
    kernels = [3, 3, 3, 3, 3, 4]
    tucker = sum(12 * 4 + 4 * 5 * k * k + 5 * 12 + 12 for k in kernels)
    assert cost(tucker2(network, (4, 5)), SHAPE).parameters == rest + tucker
    assert cost(cp(network, 5), SHAPE).parameters == rest + sum(12 * 5 + 2 * 5 * k + 5 * 12 + 12 for k in kernels)


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", ["parameters", "macs_executed"])
def test_target_is_met_and_the_next_rank_would_exceed_it(network, kind, measure):
    target = {"parameters": 2500, "macs_executed": 250_000}[measure]
    compressed = (at_parameters if measure == "parameters" else at_macs)(network, kind, target)
    choices = fractions(network, kind)
    at = choices.index(largest_fraction(network, kind, measure, target))
    here, after = (compressed_at(network, kind, choices[i]) for i in (at, at + 1))
    assert [str(m) for m in compressed.modules()] == [str(m) for m in here.modules()]
    reached = getattr(cost(compressed, SHAPE), measure)
    assert reached <= target < getattr(cost(after, SHAPE), measure)
    # A target that is reached exactly is met; with one less it is the choice before.
    assert largest_fraction(network, kind, measure, reached) == choices[at]
    assert largest_fraction(network, kind, measure, reached - 1) == choices[at - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_is_another_one_from_rank_one_to_the_largest(network, kind):
    choices = fractions(network, kind)
    ranks = [ranks_at(network, kind, fraction) for fraction in choices]
    assert {r for of in ranks[0].values() for r in of} == {1}
    assert all(before != after for before, after in pairwise(ranks))
    assert ranks_at(network, kind, float(choices[0]) / 2) == ranks[0]
    largest = {name: KINDS[kind].largest(network.get_submodule(name)) for name in ranks[-1]}
    assert ranks[-1] == largest
    assert KINDS[kind].largest(layer(channels=(2, 3))) == ((8, 12) if kind == "tucker2" else (8 * 9,))
    assert largest["conv7"] == ((12, 12) if kind == "tucker2" else (12 * 16,))
    assert largest_fraction(network, kind, "parameters", 10**9) == 1


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("kind", KINDS)
def test_target_below_rank_one_is_refused(network, kind):
    smallest = cost(compressed_at(network, kind, fractions(network, kind)[0]), SHAPE)
    at_parameters(network, kind, smallest.parameters)
    at_macs(network, kind, smallest.macs_executed)
    for fit, size in ((at_parameters, smallest.parameters), (at_macs, smallest.macs_executed)):
        with pytest.raises(ValueError, match=f"out of reach; the least is {size:,}"):
            fit(network, kind, size - 1)


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("kind", KINDS)
def test_result_repeats_can_be_trained_and_leaves_the_network_alone(network, kind):
    network.float().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.rand(1)
    state = torch.get_rng_state()
    first, second = (at_parameters(network, kind, 2500) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert tensorly.get_backend() == "numpy"
    assert network.training
    assert not any(module.training for module in first.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    for (name, value), again in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(value, again), name
        assert value.dtype == torch.float32
    first.train()(torch.randn(4, *SHAPE)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in first.parameters())


def test_what_cannot_be_compressed_is_refused(network):
    with pytest.raises(ValueError, match="no full group-to-group layer"):
        tucker2(gconv.create_model("z2cnn"), (2, 2))
    with pytest.raises(ValueError, match="unknown kind 'svd'; accepted: tucker2, cp"):
        at_parameters(network, "svd", 5000)
    with pytest.raises(ValueError, match="ranks are for conv2; accepted: conv2, conv3"):
        cp(network, {"conv2": 3})
    with pytest.raises(ValueError, match="out of range"):
        cp(network, 0)
    with pytest.raises(ValueError, match=r"accepted: 1 to \(12, 12\)"):
        tucker2(network, dict.fromkeys(ranks_at(network, "tucker2", 1), (13, 1)))
    with pytest.raises(ValueError, match="does not say the size of an image"):
        at_macs(nn.Sequential(layer()), "cp", 5000)
