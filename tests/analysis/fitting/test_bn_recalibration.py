"""Re-estimated batch norm against a twin that runs the layers one by one and averages what each batch shows."""

import copy

import pytest
import torch
from torch import nn

from analysis import reestimate_batchnorm
from gconv import GConv2d, GroupBatchNorm2d, GroupMaxPool, InputError, LiftingConv2d, SpatialMeanPool2d


def network():
    """Both kinds of batch norm after a past of their own, one of them without statistics, and dropout; in float64."""
    layers = nn.Sequential(
        LiftingConv2d(1, 3, 3, group="p4"),
        GroupBatchNorm2d(3, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.9),
        GConv2d(3, 2, 3, group="p4"),
        GroupBatchNorm2d(2, momentum=None, eps=0.1),
        GroupBatchNorm2d(2, track_running_stats=False),
        GroupMaxPool(),
        SpatialMeanPool2d(),
        nn.Flatten(),
        nn.BatchNorm1d(2),
    ).double()
    for layer in layers:
        if hasattr(layer, "running_mean"):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.uniform_(layer.bias)
    layers.train()(images(8))
    return layers.eval()


def images(count):
    return torch.rand(count, 1, 9, 9, dtype=torch.float64)


def twin(model, batches):
    """The mean over the batches of each layer's batch mean and unbiased batch variance, by its place."""
    seen = {}
    for x in batches:
        for place, layer in enumerate(model):
            if not hasattr(layer, "running_mean"):
                x = layer(x)
                continue
            columns = x.transpose(0, 1).flatten(1)
            mean, variance = columns.mean(1), columns.var(1, unbiased=True)
            seen.setdefault(place, []).append((mean, variance))
            biased = variance * (columns.shape[1] - 1) / columns.shape[1]
            shape = (-1, *[1] * (x.dim() - 2))
            scale = layer.weight / (biased + layer.eps).sqrt()
            x = (x - mean.view(shape)) * scale.view(shape) + layer.bias.view(shape)
    return {
        place: [torch.stack(parts).mean(0) for parts in zip(*rows, strict=True)]
        for place, rows in seen.items()
        if model[place].track_running_stats
    }


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(12, 4, [4, 4, 4]), (10, 4, [4, 3, 3]), (9, 8, [5, 4]), (6, 500, [6])],
)
def test_statistics_are_the_averages_over_nearly_equal_batches(count, batch_size, sizes):
    model, x = network(), images(count)
    with torch.no_grad():
        expected = twin(model, x.split(sizes))
    reestimate_batchnorm(model, x, batch_size=batch_size)
    assert list(expected) == [1, 5, 10]
    for place, (mean, variance) in expected.items():
        torch.testing.assert_close(model[place].running_mean, mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(model[place].running_var, variance, rtol=1e-12, atol=1e-14)
        assert model[place].num_batches_tracked == len(sizes)


def test_what_was_there_before_is_forgotten():
    model, x = network(), images(8)
    spoilt = copy.deepcopy(model)
    for place in (1, 5, 10):
        spoilt[place].running_mean.fill_(1e6)
        spoilt[place].running_var.fill_(1e6)
    for one in (model, spoilt):
        reestimate_batchnorm(one, x)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in spoilt.state_dict().items())


def test_nothing_but_the_statistics_changes():
    model = network()
    before = copy.deepcopy(model.state_dict())
    reestimate_batchnorm(model, images(8))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{place}.running_{what}" for place in (1, 5, 10) for what in ("mean", "var")}
    assert all(parameter.grad is None for parameter in model.parameters())


def modes(model):
    return [(module.training, getattr(module, "momentum", None)) for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_modes_and_momenta_are_put_back(fails):
    model = network()
    for place in (1, 3, 4):
        model[place].train()
    before = modes(model)
    during = []

    def note(*_):
        during.extend(modes(model))
        if fails:
            raise RuntimeError("on the way")

    handle = model[7].register_forward_hook(note)
    if fails:
        with pytest.raises(RuntimeError, match="on the way"):
            reestimate_batchnorm(model, images(4))
    else:
        reestimate_batchnorm(model, images(4))
    handle.remove()
    assert during != before
    assert modes(model) == before


def test_only_batch_norm_runs_in_train_mode():
    model = network().train()
    training = []
    handle = model[7].register_forward_hook(lambda *_: training.extend(i for i, m in enumerate(model) if m.training))
    reestimate_batchnorm(model, images(4))
    handle.remove()
    assert training == [1, 5, 10]


def test_a_network_without_batch_norm_is_not_even_run():
    model = nn.Sequential(nn.Linear(2, 2))
    reestimate_batchnorm(model, torch.zeros(3, 99))  # does not fit


@pytest.mark.parametrize("create", [network, lambda: nn.Linear(2, 2)], ids=["batch norm", "none"])
def test_no_images_are_refused(create):
    model = create()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="without images"):
        reestimate_batchnorm(model, images(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
