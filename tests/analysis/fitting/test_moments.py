"""The moments against twins that transform the inputs by every element, and what must not change on the way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from analysis.fitting import moments as module
from analysis.fitting.alternating import fit_factors
from analysis.fitting.moments import Moments, channel_weights, collect_moments, passes
from gconv import FORMS, GConv2d, GroupBatchNorm2d, GroupMaxPool, LiftingConv2d, SeparableGConv2d, SpatialMeanPool2d
from gconv.functional.expansion import act, gconv2d

few = settings(max_examples=12, deadline=None)
every_form = pytest.mark.parametrize("form", FORMS)
NAMES = ["first", "second"]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def close_moments(a, b, tolerance=1e-9):
    for name in ("second", "cross", "power", "mean", "target"):
        close(getattr(a, name), getattr(b, name), tolerance)


@st.composite
def cases(draw, *, exact=False, least_k=1, bias=True):
    """A float64 layer of any sampling and maps for it; exact: of a size that it samples symmetrically."""
    on = draw(st.sampled_from(["z2", "p2", "pm", "p4", "pmm", "p4m"]))
    layer = GConv2d(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(least_k, 3)),
        stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        bias=bias and draw(st.booleans()),
        group=on,
        dtype=torch.float64,
    )
    stride, padding, dilation = layer.sampling
    sizes = []
    for _ in "hw":
        steps = draw(st.integers(1, 3)) * stride + (0 if exact else draw(st.integers(0, 2)))
        sizes.append(dilation * (layer.kernel_size[0] - 1) + 1 + steps - 2 * padding)
    assume(min(sizes) > 0)
    x = torch.randn(2, layer.in_channels, layer.group.order, *sizes, dtype=torch.float64)
    return layer, x + torch.rand(layer.in_channels, 1, 1, 1, dtype=torch.float64)


def network(on="p4", **options):
    torch.manual_seed(3)
    body = {
        "lifting": LiftingConv2d(1, 2, 3, group=on),
        "norm": GroupBatchNorm2d(2),
        "relu": nn.ReLU(),
        "first": GConv2d(2, 3, 3, padding=1, group=on, bias=False),
        "norm1": GroupBatchNorm2d(3),
        "relu1": nn.ReLU(**options),
        "second": GConv2d(3, 2, 3, group=on),
        "relu2": nn.ReLU(**options),
        "pool": GroupMaxPool(),
        "mean": SpatialMeanPool2d(),
        "scores": nn.Linear(2, 4),
    }
    made = nn.Sequential()
    for name, part in body.items():
        made.add_module(name, part)
    for norm in (made.norm, made.norm1):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return made.double()


def converted_from(original):
    """The network with its first group-to-group layer replaced by a coarse one."""
    converted = copy.deepcopy(original)
    converted.first = SeparableGConv2d.from_dense(converted.first, "gc", 1)
    return converted


def images_for(count=5, size=9):
    return torch.randn(count, 1, size, size, dtype=torch.float64)


def input_and_output(model, name, x):
    """What a layer of a sequence reads and gives, part by part, in eval mode."""
    for own, part in copy.deepcopy(model).eval().named_children():
        if own == name:
            return x, part(x)
        x = part(x)


def patches_of(layer, x, y):
    """Patches ``[P, n]`` of an input and the outputs ``[P, O, S]`` there, one image after the other."""
    stride, padding, dilation = layer.sampling
    patches = F.unfold(x.flatten(1, 2), layer.kernel_size[0], dilation, padding, stride)
    return torch.cat(list(patches.mT)), torch.cat(list(y.flatten(3).permute(0, 3, 1, 2)))


def moments_of(patches, outputs):
    count = len(patches)
    return Moments(
        patches.mT @ patches / count,
        outputs.mT @ patches / count,
        outputs.square().mean(0),
        patches.mean(0),
        outputs.mean(0),
    )


@torch.no_grad()
def transformed(original, converted, name, images, on):
    """The moments at the identity alone, of the images and all that the group makes of them."""
    patches, outputs = [], []
    for element in range(on.order):
        moved = act(on, element, images)
        x, _ = input_and_output(converted, name, moved)
        _, y = input_and_output(original, name, moved)
        p, out = patches_of(original.get_submodule(name), x, y)
        patches.append(p)
        outputs.append(out[:, :, 0])
    return moments_of(torch.cat(patches), torch.cat(outputs))


def single(layer):
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model


def collected(layer, x, **options):
    return collect_moments(single(layer), single(layer), ["layer"], x, **options)["layer"]


def quadratic(generator, m):
    """J of every output channel for a generator ``[O, n]``."""
    return torch.stack([k @ m.second @ k - 2 * b @ k + c for k, b, c in zip(generator, m.cross, m.power, strict=True)])


# --- what they are


@few
@given(case=cases(exact=True))
def test_they_are_those_of_all_transformed_inputs(case):
    layer, x = case
    model = single(layer)
    close_moments(collected(layer, x), transformed(model, model, "layer", x, layer.group))


@pytest.mark.parametrize("on", ["z2", "p2", "pm", "p4", "pmm", "p4m"])
def test_they_are_those_of_all_transformed_images(on):
    original = network(on)
    converted = converted_from(original)
    images = images_for()
    for model in (original, converted):
        got = collect_moments(original, model, NAMES, images)
        assert list(got) == NAMES
        for name in NAMES:
            close_moments(got[name], transformed(original, model, name, images, original.first.group))


def test_inputs_are_from_the_converted_network_and_outputs_from_the_original():
    original = network()
    converted = converted_from(original)
    images = images_for()
    both = collect_moments(original, converted, NAMES, images)["second"]
    theirs, ours = (collect_moments(one, one, NAMES, images)["second"] for one in (original, converted))
    close(both.second, ours.second)
    close(both.power, theirs.power)
    close(both.target, theirs.target)
    assert (both.second - theirs.second).norm() > 1e-3 * theirs.second.norm()
    assert (both.power - ours.power).norm() > 1e-3 * ours.power.norm()


@few
@given(case=cases())
def test_the_error_under_them_is_that_of_all_outputs(case):
    layer, x = case
    noisy = copy.deepcopy(layer)
    with torch.no_grad():
        noisy.weight.add_(torch.randn_like(noisy.weight))
    # The layer reads another map than the one that the wanted output is from.
    read = x + torch.randn_like(x)

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, given):
            return self.layer(read)

    m = collect_moments(single(layer), Shifted(), ["layer"], x)["layer"]
    generator = noisy.weight.detach().flatten(1)
    with torch.no_grad():
        wanted = layer(x)
        got = gconv2d(read, noisy.weight, None, layer.group, layer.sampling)
    close(quadratic(generator, m), (got - wanted).square().mean((0, 2, 3, 4)))
    close(generator @ m.mean, got.mean((0, 2, 3, 4)))
    # With the best bias they are those of the centred moments.
    free = (got - wanted) - (got - wanted).mean((0, 2, 3, 4), keepdim=True)
    close(quadratic(generator, m.centred()), free.square().mean((0, 2, 3, 4)))
    close(m.centred().power, wanted.var((0, 2, 3, 4), correction=0))


@few
@given(case=cases(least_k=2, bias=False))
def test_the_minimum_under_them_is_that_over_all_outputs(case):
    layer, x = case
    wanted = torch.randn_like(layer(x))

    class Wanted(GConv2d):
        def forward(self, given):
            return wanted

    other = Wanted(
        layer.in_channels, layer.out_channels, layer.kernel_size, *layer.sampling, False, group=layer.group
    ).double()
    m = collect_moments(single(other), single(layer), ["layer"], x)["layer"]
    best = m.cross @ torch.linalg.pinv(m.second, hermitian=True)
    # Every output of the layer as a linear function of its generator, for one output channel.
    units = torch.eye(layer.fan_in, dtype=torch.float64).view(-1, *layer.filter_shape[1:], layer.kernel_size[0])
    columns = [gconv2d(x, unit[None], None, layer.group, layer.sampling).flatten() for unit in units]
    design = torch.stack(columns, 1)
    for channel in range(layer.out_channels):
        target = wanted[:, channel].flatten()
        solution = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution[:, 0]
        least = (design @ solution - target).square().mean()
        close(quadratic(best, m)[channel], least, 1e-7)


@every_form
@few
@given(case=cases(exact=True, least_k=2), data=st.data())
def test_the_fitted_layer_is_equivariant_and_as_good_as_promised(form, case, data):
    layer, x = case
    rank = data.draw(st.integers(1, FORMS[form].max_rank(layer.filter_shape)))
    fitted = fit_factors(layer, FORMS[form], rank, collected(layer, x), steps=4)
    made = SeparableGConv2d.from_factors(layer, form, fitted.mix, fitted.spatial, fitted.bias)
    with torch.no_grad():
        got, wanted = made(x), layer(x)
        for element in range(layer.group.order):
            close(made(act(layer.group, element, x)), act(layer.group, element, got))
    offset = 0 if layer.bias is None else wanted.mean((0, 2, 3, 4), keepdim=True)
    power = (wanted - offset).square().mean((0, 2, 3, 4))
    assume(power.min() > 1e-6)  # some read nothing but padding
    ratios = (got - wanted).square().mean((0, 2, 3, 4)) / power
    assert abs(float(ratios.mean().sqrt()) - fitted.error) < 1e-6


def test_a_constant_output_has_no_variance():
    power = torch.tensor([0.01 * (1 + 1e-15), 0.01 * (1 - 1e-15), 0.01], dtype=torch.float64)
    target = torch.tensor([0.1, 0.1, 0.05], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    variances = Moments(one[:, None], target[:, None], power, one, target).centred().power
    assert variances[:2].tolist() == [0, 0]
    close(variances[2], torch.tensor(0.0075, dtype=torch.float64))


# --- in parts


@few
@given(case=cases(), batch=st.integers(1, 3), block=st.sampled_from([1, 2000, 2**20]))
def test_batches_and_blocks_change_nothing(case, batch, block):
    layer, x = case
    x = torch.cat([x, 2 * x, x.flip(0) + 1])
    whole = collected(layer, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH", batch)
        patch.setattr(module, "BLOCK_BYTES", block)
        close_moments(collected(layer, x), whole)


def test_maps_that_are_kept_are_bounded(monkeypatch):
    layer = GConv2d(2, 3, 3, group="p4", dtype=torch.float64)
    x = torch.randn(40, 2, 4, 6, 6, dtype=torch.float64)
    each = 8 * 4 * (2 * 6 * 6 + 3 * 4 * 4)
    seen = []
    layer.register_forward_hook(lambda module, given, output: seen.append(len(output)))
    whole = collected(layer, x)
    monkeypatch.setattr(module, "KEPT_BYTES", 8 * each)
    seen.clear()
    close_moments(collected(layer, x), whole)
    assert seen == [1] + [8] * (len(seen) - 1)
    monkeypatch.setattr(module, "KEPT_BYTES", 1)  # one image is the least
    close_moments(collected(layer, x), whole)


def test_blocks_of_patches_are_bounded(monkeypatch):
    layer = GConv2d(2, 1, 3, group="p4", dtype=torch.float64)
    x = torch.randn(40, 2, 4, 6, 6, dtype=torch.float64)
    one = 8 * layer.fan_in * 16
    sizes = []
    unfold = F.unfold

    def watched(*given):
        sizes.append(unfold(*given).nbytes)
        return unfold(*given)

    monkeypatch.setattr(module, "BLOCK_BYTES", 5 * one + 1)
    monkeypatch.setattr(F, "unfold", watched)
    collected(layer, x)
    assert sizes == [5 * one] * 8
    sizes.clear()
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)  # one image is the least
    collected(layer, x)
    assert sizes == [one] * 40


def watch_counts(monkeypatch):
    """How many patches each layer has looked at."""
    counts = []

    class Watched(module.MomentSums):
        def averaged(self):
            counts.append(self.count)
            return super().averaged()

    monkeypatch.setattr(module, "MomentSums", Watched)
    return counts


def test_about_as_many_patches_are_looked_at_as_asked_for(monkeypatch):
    counts = watch_counts(monkeypatch)
    layer = GConv2d(1, 1, 3, group="p4", dtype=torch.float64)
    x = torch.randn(100, 1, 4, 12, 12, dtype=torch.float64)  # 10,000 patches
    monkeypatch.setattr(module, "BATCH", 30)
    whole = collected(layer, x)
    some = collected(layer, x, patches=2000)
    collected(layer, x, patches=10_000)
    collected(layer, x, patches=200)
    assert counts[0] == counts[2] == 10_000
    assert 1800 < counts[1] < 2200
    assert 140 < counts[3] < 260
    # They are a fair sample.
    assert 0 < (some.second - whole.second).norm() < 0.2 * whole.second.norm()
    assert 0 < abs(some.power - whole.power) < 0.2 * whole.power


def test_the_choice_of_patches_is_of_the_seed():
    layer = GConv2d(1, 1, 3, group="p4", dtype=torch.float64)
    x = torch.randn(10, 1, 4, 8, 8, dtype=torch.float64)
    state = torch.get_rng_state()
    one, same, other = (collected(layer, x, patches=60, seed=seed) for seed in (1, 1, 2))
    assert one.second.equal(same.second)
    assert not one.second.equal(other.second)
    assert torch.get_rng_state().equal(state)


def test_inputs_and_outputs_are_of_the_same_patches():
    layer = GConv2d(2, 2, 2, bias=False, group="p2", dtype=torch.float64)
    m = collected(layer, torch.randn(5, 2, 2, 6, 6, dtype=torch.float64), patches=25)
    close(quadratic(layer.weight.detach().flatten(1), m), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("patches", [1, 1e-9])
def test_no_patches_at_all_give_zeros(patches):
    layer = GConv2d(1, 1, 2, group="p2", dtype=torch.float64)
    m = collected(layer, torch.randn(1, 1, 2, 2, 2, dtype=torch.float64), patches=patches)
    assert m.second.isfinite().all()
    assert (m.power.item() == 0) == (patches < 1)


def test_sums_are_in_double_precision():
    layer = GConv2d(1, 1, 2, group="p2")
    x = torch.rand(3, 1, 2, 5, 5)
    m = collected(layer, x)
    assert all(getattr(m, name).dtype == torch.float64 for name in ("second", "cross", "power", "mean", "target"))
    close_moments(m, collected(layer.double(), x.double()), 1e-5)


# --- what is left as it was


class NotReached(nn.Module):
    """Takes a single image, by which the calls of the layers are counted, and no more."""

    def forward(self, x):
        if len(x) > 1:
            raise AssertionError("this part need not run")
        return x


def traces(model):
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    modes = [part.training for part in model.modules()]
    momenta = [getattr(part, "momentum", None) for part in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return hooks, modes, momenta, state, frozen


def untouched(before, after):
    assert before[:3] == after[:3]
    assert before[4] == after[4]
    assert all(before[3][name].equal(tensor) for name, tensor in after[3].items())


def mixed_modes(model):
    model.train()
    model.norm1.eval()
    model.relu1.eval()
    model.lifting.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_networks_are_left_as_they_were(fails):
    original, images = mixed_modes(network()), images_for(size=2 if fails else 9)
    converted = mixed_modes(converted_from(original))
    before = traces(original), traces(converted)
    state = torch.get_rng_state()

    def attempt(function, *given):
        if fails:
            with pytest.raises(RuntimeError):
                function(*given)
        else:
            function(*given)

    attempt(collect_moments, original, converted, NAMES, images)
    attempt(channel_weights, original, NAMES, images)
    untouched(before[0], traces(original))
    untouched(before[1], traces(converted))
    assert torch.get_rng_state().equal(state)


def test_batch_norm_uses_its_running_statistics():
    original, images = network(), images_for()
    expected = collect_moments(original.eval(), original, NAMES, images)
    got = collect_moments(original.train(), original, NAMES, images)
    for name in NAMES:
        close_moments(got[name], expected[name], 0)
    halves = [collect_moments(original, original, NAMES, half)["second"].second for half in images[:4].split(2)]
    close(sum(halves) / 2, collect_moments(original, original, NAMES, images[:4])["second"].second)


def test_the_network_runs_only_as_far_as_the_last_layer():
    original, images = network(), images_for()
    expected = collect_moments(original, original, ["first"], images)["first"]
    original.norm1 = NotReached()
    close_moments(collect_moments(original, original, ["first"], images)["first"], expected, 0)


class Twice(nn.Module):
    """Runs ``first`` and then ``second``, which may be one layer or two, on maps of two sizes."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        x = self.second(self.first(x).tanh())
        return x.flatten(1)[:, :5]


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_that_runs_twice_has_the_moments_of_both_calls(bias):
    torch.manual_seed(0)
    layer = GConv2d(2, 2, 3, bias=bias, group="p4", dtype=torch.float64)
    once, twice = Twice(layer, copy.deepcopy(layer)), Twice(layer, layer)
    images = torch.randn(12, 2, 4, 9, 9, dtype=torch.float64)
    one, other = (collect_moments(once, once, ["first", "second"], images)[name] for name in ("first", "second"))
    (both,) = collect_moments(twice, twice, ["first"], images).values()
    for name in ("second", "cross", "power", "mean", "target"):  # 7 x 7 positions in one call, 5 x 5 in the other
        close(getattr(both, name), (49 * getattr(one, name) + 25 * getattr(other, name)) / 74)
    weights = channel_weights(once, ["first", "second"], images)
    close(channel_weights(twice, ["first"], images)["first"], weights["first"] + weights["second"])


def test_operations_in_place_do_not_change_what_was_seen():
    plain, inplace, images = network(), network(inplace=True), images_for()
    inplace.norm1 = nn.Identity()  # so that the activation changes the layer's own output
    plain.norm1 = nn.Identity()
    expected, got = (collect_moments(one, one, NAMES, images) for one in (plain, inplace))
    for name in NAMES:
        close_moments(got[name], expected[name], 0)
    expected, got = (channel_weights(one, NAMES, images) for one in (plain, inplace))
    for name in NAMES:
        close(got[name], expected[name], 0)


def test_inputs_changed_in_place_later_are_those_that_the_layer_read():
    class Block(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            torch.manual_seed(0)
            self.inplace = inplace
            self.first = GConv2d(1, 1, 3, padding=1, group="p4", dtype=torch.float64)
            self.second = GConv2d(1, 1, 3, group="p4", dtype=torch.float64)

        def forward(self, x):
            x = 1 * x
            y = self.first(x)
            return self.second(x.add_(y) if self.inplace else x + y)

    images = torch.randn(3, 1, 4, 6, 6, dtype=torch.float64)
    expected, got = (collect_moments(one, one, NAMES, images) for one in (Block(False), Block(True)))
    for name in NAMES:
        close_moments(got[name], expected[name], 0)


# --- how much an output channel matters


def linear_network(on="p4", channels=3, classes=4):
    """Scores linear in the output of the layer, so that the gradient is the same for every image."""
    model = nn.Sequential()
    model.add_module("layer", GConv2d(1, channels, 1, group=on))
    model.add_module("flat", nn.Flatten())
    model.add_module("scores", nn.Linear(4 * channels, classes))
    return model.double()


def expected_weights(model):
    """The mean over directions without a common part, exactly: the squared gradients of the centred scores."""
    weight = model.scores.weight.detach()
    centred = weight - weight.mean(0)
    return centred.square().sum(0).view(model.layer.out_channels, -1).sum(1)


def test_weights_are_the_squared_gradients_of_the_scores(monkeypatch):
    model = linear_network()
    images = torch.randn(4000, 1, 4, 1, 1, dtype=torch.float64)
    got = channel_weights(model, ["layer"], images)["layer"]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected_weights(model), rtol=0.1, atol=0)
    monkeypatch.setattr(module, "GRADIENT_BATCH", 4000)
    torch.testing.assert_close(channel_weights(model, ["layer"], images)["layer"], got, rtol=0.1, atol=0)


def test_weights_of_channels_are_in_proportion():
    # With two classes there is one direction but for its length.
    model = linear_network(classes=2)
    images = torch.randn(70, 1, 4, 1, 1, dtype=torch.float64)
    got, expected = channel_weights(model, ["layer"], images)["layer"], expected_weights(model)
    close(got / got.sum(), expected / expected.sum())


def test_a_common_offset_of_the_scores_does_not_matter():
    model = linear_network()
    images = torch.randn(7, 1, 4, 1, 1, dtype=torch.float64)
    before = channel_weights(model, ["layer"], images)["layer"]
    with torch.no_grad():
        model.scores.weight.add_(torch.randn(12, dtype=torch.float64))
    close(channel_weights(model, ["layer"], images)["layer"], before)
    with torch.no_grad():
        model.scores.weight.copy_(torch.randn(12, dtype=torch.float64).expand(4, 12))
    assert channel_weights(model, ["layer"], images)["layer"].max() < 1e-25


def test_weights_are_of_the_network_in_eval_mode_and_of_the_seed():
    model, images = network(), images_for()
    one = channel_weights(model.train(), NAMES, images, seed=1)
    same, other = (channel_weights(model.eval(), NAMES, images, seed=seed) for seed in (1, 2))
    for name, size in zip(NAMES, (3, 2), strict=True):
        assert one[name].shape == (size,)
        close(one[name], same[name], 0)
        assert not one[name].equal(other[name])


def test_weights_need_no_trainable_parameters():
    model, images = network(), images_for()
    expected = channel_weights(model, NAMES, images)
    with torch.no_grad():
        got = channel_weights(model.requires_grad_(False), NAMES, images)
    for name in NAMES:
        close(got[name], expected[name], 0)


def test_weights_predict_what_a_small_error_does():
    # A perturbation of one channel's output, against the gradient's promise, with the scores' common part removed.
    model = network(on="p2").eval()
    images = images_for(1)
    with torch.no_grad():
        _, y = input_and_output(model, "second", images)

        def scores(y):
            return model.scores(model.mean(model.pool(model.relu2(y))))

    jacobian = torch.autograd.functional.jacobian(scores, y)[0]
    centred = jacobian - jacobian.mean(0)
    expected = centred.square().sum((0, 1, 3, 4, 5))
    mean = torch.stack([channel_weights(model, ["second"], images, seed=s)["second"] for s in range(300)]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0.25, atol=0)


# --- layers that are looked at together


@few
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    room=st.integers(1, 12),
    longest=st.none() | st.integers(1, 3),
)
def test_groups_of_layers_fit_into_memory(sizes, room, longest):
    model = nn.ModuleList(GConv2d(size, 1, 1, group="p2") for size in sizes)
    names = [str(n) for n in range(len(sizes))]
    bytes_of = {name: 16 * (2 * size) ** 2 for name, size in zip(names, sizes, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOMENT_BYTES", 64 * room)
        groups = passes(model, names, longest)
    assert [name for some in groups for name in some] == names
    for some, following in zip(groups, [*groups[1:], None], strict=True):
        own = sum(bytes_of[name] for name in some)
        assert len(some) == 1 or own <= 64 * room
        assert longest is None or len(some) <= longest
        # The next one had no place any more.
        assert following is None or len(some) == longest or own + bytes_of[following[0]] > 64 * room


def test_no_layers_are_no_groups():
    assert passes(nn.ModuleList(), []) == []
