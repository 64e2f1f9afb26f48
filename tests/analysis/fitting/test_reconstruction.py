"""Refining layers behind their batch norm and ReLU: what changes, what stays, and that it is the descent it says."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gconv
from analysis.fitting import reconstruction as refinement
from analysis.fitting.reconstruction import refine, refinement_steps

NAMES = [f"conv{i}" for i in range(2, 8)]


def network(name="p4cnn", **settings):
    """With batch norms of many different numbers, as after training."""
    torch.manual_seed(1)
    model = gconv.create_model(name, width=2, **settings).double().eval()
    for module in model.modules():
        if isinstance(module, gconv.GroupBatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.3, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(30):  # so that the ReLUs are neither all open nor all shut
            model(images(8, model.image_size, model.spec.in_channels))
    return model.eval()


def converted(model, names, form="gc_in"):
    other = copy.deepcopy(model)
    for name in names:
        other.set_submodule(name, gconv.SeparableGConv2d.from_dense(model.get_submodule(name), form, 1))
    return other


def images(count=40, size=28, channels=1):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, size, size, generator=generator, dtype=torch.float64)


def after_relu(model, x, layer):
    """What the batch norm and ReLU behind conv ``layer`` give."""
    for i in range(1, layer + 1):
        x = F.relu(getattr(model, f"bn{i}")(getattr(model, f"conv{i}")(x)))
        if i == 2 and layer > 2:
            x = model.pool(x)
    return x


def error(model, other, layer, x):
    with torch.no_grad():
        wanted = after_relu(model, x, layer)
        return float((after_relu(other, x, layer) - wanted).square().mean() / wanted.square().mean())


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def of_norm(name):
    """The parameters and the statistics of a batch norm."""
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{name}.{part}" for part in parts}


def test_every_layer_comes_nearer_to_the_original_on_images_that_it_has_not_seen():
    model = gconv.load("checkpoints/p4cnn-rotdigits.pt")
    data, names = gconv.load_dataset("rotdigits"), ["conv5", "conv6", "conv7"]
    other = converted(model, names)
    start = copy.deepcopy(other)
    refine(model, other, names, data.train.images, 20)
    for layer in (5, 6, 7):
        images = data.validation.images
        assert error(model, other, layer, images) < 0.9 * error(model, start, layer, images)


def test_a_layer_that_would_become_worse_stays(monkeypatch):
    model = network()
    other = converted(model, NAMES)
    before = state(other)
    monkeypatch.setattr(refinement, "LEARNING_RATE", 1e3)
    refine(model, other, NAMES, images(), 2)
    assert not changed(before, state(other))


def test_where_there_is_nothing_to_imitate_nothing_happens():
    model = network()
    model.bn4.bias.data.fill_(-100)  # the ReLU behind it is shut
    other = converted(model, NAMES)
    before = state(other)
    refine(model, other, ["conv4"], images(), 2)
    assert not changed(before, state(other))


def test_only_the_layers_and_the_norms_behind_them_change():
    model = gconv.load("checkpoints/p4cnn-rotdigits.pt")
    other = converted(model, NAMES)
    before, original = state(other), state(model)
    refine(model, other, ["conv6"], gconv.load_dataset("rotdigits").train.images, 10)
    assert changed(before, state(other)) == {f"conv6.{name}" for name in ("mix", "spatial", "bias")} | of_norm("bn6")
    assert not changed(original, state(model))


def test_one_layer_is_adam_on_the_relative_error_behind_the_relu():
    model = network()
    other = converted(model, NAMES)
    twin = copy.deepcopy(other)
    x, steps = images(), 3
    refine(model, other, ["conv3"], x, steps, seed=5)
    generator = torch.Generator().manual_seed(5)
    torch.randint(len(x), (256,), generator=generator)  # the probe
    twin.bn3.train()
    adam = torch.optim.Adam([*twin.conv3.parameters(), *twin.bn3.parameters()])
    for step in range(steps):
        adam.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        batch = x[torch.randint(len(x), (64,), generator=generator)]
        wanted = after_relu(model, batch, 3).detach()
        loss = (after_relu(twin, batch, 3) - wanted).square().mean() / wanted.square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert changed(state(converted(model, NAMES)), state(other))
    for (name, mine), theirs in zip(other.named_parameters(), twin.parameters(), strict=True):
        # The gradient of the bias is nothing but rounding, which Adam divides by its size.
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-5 if name == "conv3.bias" else 1e-11)


def test_later_layers_read_what_the_refined_ones_give():
    model = network()
    together, one_by_one = converted(model, NAMES), converted(model, NAMES)
    refine(model, together, ["conv2", "conv3"], images(), 2)
    generators_agree = copy.deepcopy(one_by_one)
    refine(model, generators_agree, ["conv2"], images(), 2)
    assert torch.equal(together.conv2.mix, generators_agree.conv2.mix)
    alone = copy.deepcopy(one_by_one)
    refine(model, alone, ["conv3"], images(), 2)
    assert not torch.equal(together.conv3.mix, alone.conv3.mix)


@pytest.mark.parametrize("form", gconv.FORMS)
@pytest.mark.parametrize("group", ["p2", "p4", "p4m"])
def test_it_stays_equivariant(form, group):
    model = network(group=group)
    other = converted(model, NAMES, form)
    refine(model, other, NAMES, images(8), 2)
    assert gconv.equivariance_error(other, group, images(2)).max < 1e-12


def test_a_layer_without_a_batch_norm_behind_it_stays():
    model = network("p4m-resnet44")
    names = ["stage1.0.conv1", "stage1.0.conv2"]
    other = converted(model, names)
    before = state(other)
    refine(model, other, names, images(4, 8, 3), 2)
    first = {"stage1.0.conv1.mix", "stage1.0.conv1.spatial"} | of_norm("stage1.0.bn2")
    assert changed(before, state(other)) == first


def test_frozen_weights_are_refined_and_stay_frozen_and_modes_are_kept():
    model = network()
    other = converted(model, NAMES).train()
    other.requires_grad_(False)
    refine(model, other, NAMES, images(8), 1)
    assert other.training
    assert other.bn3.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in other.parameters())
    assert not torch.equal(other.conv3.mix, converted(model, NAMES).conv3.mix)


def test_the_same_seed_gives_the_same_bits():
    model = network()
    found = []
    for seed in (3, 3, 4):
        other = converted(model, NAMES)
        torch.rand(seed)
        refine(model, other, NAMES, images(), 2, seed=seed)
        found.append(state(other))
    assert not changed(found[0], found[1])
    assert changed(found[0], found[2])


def test_steps_are_passes_over_the_images_as_far_as_the_work_allows(monkeypatch):
    monkeypatch.setattr(refinement, "PASSES", 3)
    monkeypatch.setattr(refinement, "WORK", 64 * 100)
    monkeypatch.setattr(refinement, "LEAST_STEPS", 20)
    assert refinement_steps(1, 1, 640) == 30
    assert refinement_steps(1, 1, 64_000) == 100
    assert refinement_steps(2, 2, 64_000) == 25
    assert refinement_steps(2, 3, 64_000) == 0  # fewer than are worth it
    assert refinement_steps(1, 1, 64) == 0
