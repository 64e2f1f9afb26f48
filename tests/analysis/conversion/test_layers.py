"""What a network shares stays shared by a conversion and is counted once; what is frozen stays frozen."""

import copy

import pytest
import torch
from torch import nn

from analysis import convert, to_dense
from analysis.conversion.layers import replace_layer, runs_of, sharing
from analysis.latency import timing
from gconv import (
    FORMS,
    GConv2d,
    GroupBatchNorm2d,
    GroupMaxPool,
    InputError,
    LiftingConv2d,
    SeparableGConv2d,
    SpatialMeanPool2d,
    Split,
    cost,
)

SIZE = (1, 9, 9)
ON_FILTERS = [{"rank": 1}, {"energy": 0.8}, {"params": 0.6}, {"params": 0.8}, {"macs": 0.6}, {"latency": 1.0}]
ON_OUTPUTS = [{"form": "gc", "rank": 1}, {"form": "gc", "params": 0.8}]


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch):
    """Nothing here depends on how fast the networks are."""
    monkeypatch.setattr(timing, "medians", lambda runs, **_: ([1.0] * len(runs), 1))


class Network(nn.Module):
    """Three layers from group to group with batch norm behind each; ``order`` says which run, and how often."""

    def __init__(self, order="abc"):
        super().__init__()
        self.order = order
        self.lift = LiftingConv2d(1, 4, 3, group="p4")
        self.a, self.b, self.c = (GConv2d(4, 4, 3, padding=1, group="p4") for _ in range(3))
        self.norm_a, self.norm_b, self.norm_c = (GroupBatchNorm2d(4) for _ in range(3))
        self.head = nn.Sequential(GroupMaxPool(), SpatialMeanPool2d(), nn.Linear(4, 3))

    def forward(self, x):
        x = self.lift(x)
        for name in self.order:
            x = getattr(self, f"norm_{name}")(getattr(self, name)(x)).relu()
        return self.head(x)


def one_weight():
    net = Network()
    net.b.weight = net.a.weight
    return net


def one_bias():
    net = Network()
    net.b.bias = net.a.bias
    return net


def one_weight_with_another_kind_of_layer():
    net = Network()
    net.scale = nn.Module()
    net.scale.like_a = net.a.bias
    return net


def one_layer_with_two_names():
    net = Network()
    net.b = net.a
    return net


def one_block_with_two_names():
    net = Network()
    net.first = nn.Sequential(net.a)
    net.second = net.first
    return net


def one_layer_that_runs_three_times():
    return Network("aabac")


SHARING = [
    one_weight, one_bias, one_weight_with_another_kind_of_layer,
    one_layer_with_two_names, one_block_with_two_names, one_layer_that_runs_three_times,
]  # fmt: skip
every_kind = pytest.mark.parametrize("make", SHARING, ids=lambda make: make.__name__)


def trained(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
        with torch.no_grad():
            net.train()(torch.rand(16, *SIZE))
    return net.eval()


def images(count=24):
    generator = torch.Generator().manual_seed(1)
    return Split(torch.rand(count, *SIZE, generator=generator), torch.arange(count) % 3)


def shared(net):
    """The names that stand for one module, and those that stand for one parameter."""
    modules, parameters = {}, {}
    for name, module in net.named_modules(remove_duplicate=False):
        modules.setdefault(id(module), set()).add(name)
    for name, parameter in net.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), set()).add(name)
    return [
        sorted(map(sorted, filter(lambda names: len(names) > 1, found.values()))) for found in (modules, parameters)
    ]


def size_of(net):
    return sum(parameter.numel() for parameter in net.parameters())


@every_kind
@pytest.mark.parametrize("budget", [*ON_FILTERS, *({**budget, "data": True} for budget in ON_OUTPUTS)], ids=str)
def test_what_is_shared_stays_shared_and_is_counted_once(make, budget):
    net = trained(make)
    modules, parameters = shared(net)
    given = {**budget, "data": images()} if "data" in budget else budget
    try:
        after, report = convert(net, **given, input_shape=SIZE)
    except InputError as refusal:
        if "out of reach" not in str(refusal):
            raise
        return
    assert shared(after)[0] == modules
    present = {name for name, _ in after.named_parameters(remove_duplicate=False)}
    kept = [names for names in parameters if present.issuperset(names)]
    assert all(names in shared(after)[1] for names in kept)
    assert kept or modules or make is one_layer_that_runs_three_times
    assert report.parameters == (size_of(net), size_of(after))
    assert report.macs_executed == tuple(cost(one, SIZE).macs_executed for one in (net, after))
    for kind, (before, now) in {"params": report.parameters, "macs": report.macs_executed}.items():
        if kind in budget:
            assert now <= budget[kind] * before


@every_kind
def test_a_conversion_never_gets_larger_than_its_budget_for_parameters(make):
    """As it did where one copy of what was shared was replaced, and the other left beside it."""
    net = trained(make)
    least = None
    for share in (0.3, 0.5, 0.7, 0.9):
        try:
            after, _ = convert(net, "gc", params=share, input_shape=SIZE)
        except InputError:
            continue
        least = size_of(after) if least is None else least
        assert size_of(after) <= share * size_of(net)
    assert least is not None


@pytest.mark.parametrize("make", [one_weight, one_bias, one_weight_with_another_kind_of_layer])
def test_a_layer_that_shares_a_parameter_is_left_as_it_is_and_the_report_says_why(make):
    net = trained(make)
    for budget in ({"rank": 1}, {"params": 0.9}):
        after, report = convert(net, "gc", **budget, input_shape=SIZE)
        rows = {row.name: row for row in report.layers}
        assert type(after.a) is GConv2d
        assert rows["a"].form is None
        assert "are one parameter, which stays shared" in rows["a"].why
        assert {rows["b"].form, rows["c"].form} <= {"gc", None} and any(row.form for row in report.layers)


@pytest.mark.parametrize("make", [one_layer_with_two_names, one_layer_that_runs_three_times])
def test_a_layer_that_runs_several_times_is_converted_in_all_places(make):
    net = trained(make)
    for given in ({}, {"data": images()}):
        after, report = convert(net, "gc", energy=1.0, input_shape=SIZE, **given)
        assert {row.form for row in report.layers} == {"gc"}
        assert isinstance(after.a, SeparableGConv2d)
        assert (after.a is after.b) == (net.a is net.b)
        if not given:  # at full rank nothing is lost
            with torch.no_grad():
                torch.testing.assert_close(after(images().images), net(images().images), rtol=1e-4, atol=1e-5)


def test_a_layer_runs_as_often_as_it_is_called():
    net = trained(one_layer_that_runs_three_times)
    runs = runs_of(net, {name: getattr(net, name) for name in "cba"}, SIZE)
    assert list(runs) == ["a", "b", "c"]
    assert runs["a"] == (3, (3 * 49, 3 * 49))
    assert runs["b"] == (1, (49, 49))


def test_layers_that_share_nothing_are_not_reported_as_sharing():
    assert sharing(Network()) == {}
    assert set(sharing(one_weight())) == {"a", "b"}
    assert set(sharing(one_weight_with_another_kind_of_layer())) == {"a"}
    assert sharing(one_layer_with_two_names()) == {}


# --- frozen layers


@pytest.mark.parametrize("with_data", [False, True], ids=["filters", "outputs"])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_what_is_frozen_stays_frozen(frozen, with_data):
    net = trained(Network)
    for name in frozen:
        getattr(net.a, name).requires_grad_(False)
    net.head[-1].weight.requires_grad_(False)
    given = {"data": images()} if with_data else {}
    after, _ = convert(net, "gc", rank=1, input_shape=SIZE, **given)
    for one in (after, convert(after, "gc_in", rank=1, input_shape=SIZE)[0]):
        assert one.a.mix.requires_grad is one.a.spatial.requires_grad is ("weight" not in frozen)
        assert one.a.bias.requires_grad is ("bias" not in frozen)
        assert all(parameter.requires_grad for parameter in one.b.parameters())
        assert not one.head[-1].weight.requires_grad
    dense = to_dense(after)
    assert dense.a.weight.requires_grad is ("weight" not in frozen)
    assert dense.a.bias.requires_grad is ("bias" not in frozen)


def test_a_frozen_layer_is_not_fine_tuned():
    net = trained(Network)
    net.a.requires_grad_(False)
    before, _ = convert(net, "gc", rank=1, data=images(), minimise="weights")
    after, _ = convert(net, "gc", rank=1, data=images(), minimise="weights", finetune=3)
    for name, parameter in before.a.named_parameters():
        assert torch.equal(parameter, dict(after.a.named_parameters())[name])
    assert not torch.equal(before.b.mix, after.b.mix)


# --- back to full layers


def test_separable_layers_that_share_a_factor_are_not_folded_back():
    net, _ = convert(trained(Network), "gc", rank=1, input_shape=SIZE)
    net.b.mix = net.a.mix
    with pytest.raises(InputError, match=r"^a cannot be folded back: a.mix and b.mix are one parameter"):
        to_dense(net)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_with_two_names_is_folded_back_under_both(form):
    net, _ = convert(trained(one_layer_with_two_names), form, rank=1, input_shape=SIZE)
    dense = to_dense(net)
    assert dense.a is dense.b
    assert type(dense.a) is GConv2d
    with torch.no_grad():
        torch.testing.assert_close(dense(images().images), net(images().images), rtol=1e-4, atol=1e-5)


def test_a_layer_is_replaced_under_every_name():
    net = copy.deepcopy(one_block_with_two_names())
    new = SeparableGConv2d.from_dense(net.a, "gc", 1)
    replace_layer(net, "a", new)
    assert net.a is net.first[0] is net.second[0] is new


def test_a_single_layer_is_no_network():
    with pytest.raises(InputError, match=r"^the model is a single layer\. Use gconv\.SeparableGConv2d\.from_dense"):
        convert(GConv2d(2, 2, 3, group="p4"), rank=1, input_shape=(2, 4, 9, 9))
