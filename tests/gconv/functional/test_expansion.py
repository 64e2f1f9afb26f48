"""Expansion, convolution and action against twins that only turn pictures and know no index table."""

import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gconv import GROUPS, InputError, act, gconv2d, group
from gconv.functional.expansion import (
    Sampling,
    Tables,
    expand,
    from_group_major,
    is_strictly_channels_last,
    is_tf32_allowed,
    relu,
    to_group_major,
    to_planar,
)

PICTURE = torch.arange(9).view(3, 3)

every_group = pytest.mark.parametrize("on", [group(name) for name in GROUPS], ids=str)
sizes = st.integers(1, 5)
channels = st.integers(1, 3)
samplings = st.builds(Sampling, stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2))


def turned(on, s, image):
    flips, turns = divmod(on.elements[s], 4)
    image = torch.rot90(image, turns, (-2, -1))
    return image.flip(-2) if flips else image


def relative(on, s, t):
    """The element u with s u = t: the one that, followed by s, leaves the same picture as t."""
    (u,) = (u for u in range(on.order) if turned(on, s, turned(on, u, PICTURE)).equal(turned(on, t, PICTURE)))
    return u


def expanded_filters(on, weight):
    """``K_s[o, i, s', y] = K[o, i, s^-1 s', s^-1 y]``, one ``[O, I, S_in, k, k]`` filter for each s."""
    if weight.shape[2] == 1:
        return [turned(on, s, weight) for s in range(on.order)]
    everyone = range(on.order)
    return [turned(on, s, weight[:, :, [relative(on, s, t) for t in everyone]]) for s in everyone]


def drawn(on, lifting, o, i, k, n, m):
    s_in = 1 if lifting else on.order
    x = torch.randn(2, i, s_in, n, m, dtype=torch.float64)
    return x, torch.randn(o, i, s_in, k, k, dtype=torch.float64), torch.randn(o, dtype=torch.float64)


@every_group
@given(lifting=st.booleans(), o=channels, i=channels, k=sizes)
def test_expand_is_its_definition_bit_for_bit(on, lifting, o, i, k):
    _, weight, _ = drawn(on, lifting, o, i, k, 1, 1)
    expected = torch.stack(expanded_filters(on, weight), dim=1).flatten(2, 3).flatten(0, 1)
    assert expand(weight, Tables.build(on, k, lifting=lifting).expansion).equal(expected)


@every_group
def test_an_error_of_the_generator_is_the_same_relative_error_of_the_expanded_filter(on):
    expansion = Tables.build(on, 3).expansion
    _, weight, _ = drawn(on, False, 2, 3, 3, 1, 1)
    error = torch.randn_like(weight)
    torch.testing.assert_close(
        expand(error, expansion).norm() / expand(weight, expansion).norm(), error.norm() / weight.norm()
    )


@every_group
@given(lifting=st.booleans(), o=channels, i=channels, k=sizes, sampling=samplings, extra=st.tuples(sizes, sizes))
def test_gconv2d_is_the_sum_over_pairs_of_elements(on, lifting, o, i, k, sampling, extra):
    x, weight, bias = drawn(on, lifting, o, i, k, *(sampling.dilation * (k - 1) + e for e in extra))
    expected = torch.stack(
        [
            sum(F.conv2d(x[:, :, t], filters[:, :, t], None, *sampling) for t in range(x.shape[2]))
            for filters in expanded_filters(on, weight)
        ],
        dim=2,
    )
    torch.testing.assert_close(gconv2d(x, weight, None, on.name, sampling), expected, rtol=1e-12, atol=1e-12)
    shared = expected + bias[:, None, None, None]
    torch.testing.assert_close(gconv2d(x, weight, bias, on, sampling), shared, rtol=1e-12, atol=1e-12)


@every_group
@given(planar=st.booleans(), n=sizes, m=sizes)
def test_act_is_its_definition(on, planar, n, m):
    x = torch.randn(2, 3, on.order, n, m)
    for g in range(on.order):
        if planar:
            assert act(on, g, x[:, :, 0]).equal(turned(on, g, x[:, :, 0]))
        else:
            sources = [relative(on, g, s) for s in range(on.order)]
            assert act(on.name, g, x).equal(turned(on, g, x[:, :, sources]))


@every_group
def test_acting_twice_is_acting_with_the_product(on):
    x = torch.randn(1, 2, on.order, 3, 4)
    for a in range(on.order):
        for b in range(on.order):
            assert act(on, a, act(on, b, x)).equal(act(on, int(on.product[a, b]), x))


def test_class_scores_are_left_alone():
    scores = torch.randn(5, 10)
    assert all(act("p4m", g, scores).equal(scores) for g in range(8))


def test_planar_layout_puts_the_group_axis_inside_the_channels():
    x = torch.randn(2, 3, 4, 5, 6)
    planar = to_planar(x)
    assert planar.shape == (2, 12, 5, 6)
    assert all(planar[:, 4 * c + s].equal(x[:, c, s]) for c in range(3) for s in range(4))
    assert to_planar(planar) is planar


def test_the_group_major_layout_puts_the_channels_inside_the_group_axis() -> None:
    x = torch.arange(2 * 3 * 4).view(1, 2, 3, 2, 2)
    planar = to_group_major(x)
    assert planar.equal(torch.cat([x[:, :, s] for s in range(3)], 1))
    assert from_group_major(planar, 3).equal(x)
    again = to_group_major(from_group_major(planar, 3))
    assert again.data_ptr() == planar.data_ptr() and again.is_contiguous()
    assert to_group_major(planar) is planar


@pytest.mark.parametrize("lifting", [False, True])
def test_an_expanded_filter_is_one_function_in_both_orders_of_channels(lifting: bool) -> None:
    weight = torch.randn(2, 3, 1 if lifting else 4, 3, 3, dtype=torch.float64)
    expansion = Tables.build(group("p4"), 3, lifting=lifting).expansion
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64) if lifting else torch.randn(1, 3, 4, 5, 5, dtype=torch.float64)
    y = F.conv2d(to_planar(x), expand(weight, expansion)).unflatten(1, (2, 4))
    z = from_group_major(F.conv2d(to_group_major(x), expand(weight, expansion, group_major=True)), 4)
    torch.testing.assert_close(z, y)


def test_act_refuses_a_group_axis_of_another_length() -> None:
    with pytest.raises(InputError, match=r"accepted: \[N, C, 4, H, W\]"):
        act("p4", 1, torch.zeros(1, 2, 8, 5, 5))


def test_relu_is_in_place_where_no_gradient_is_needed():
    x = torch.tensor([-1.0, 2.0])
    assert relu(x.requires_grad_()).tolist() == [0.0, 2.0]
    assert x.tolist() == [-1.0, 2.0]
    with torch.no_grad():
        y = relu(x.detach())
    assert y.data_ptr() == x.data_ptr()
    assert x.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("group_major", [False, True])
def test_an_expanded_filter_has_the_same_values_in_both_memory_formats(group_major):
    weight = torch.randn(2, 3, 4, 3, 3)
    expansion = Tables.build(group("p4"), 3).expansion
    plain = expand(weight, expansion, group_major=group_major)
    last = expand(weight, expansion, group_major=group_major, channels_last=True)
    assert last.equal(plain)
    assert plain.is_contiguous() and is_strictly_channels_last(last)


def test_the_view_of_a_single_image_stays_channels_last():
    planar = torch.randn(1, 12, 5, 5).contiguous(memory_format=torch.channels_last)
    again = to_group_major(from_group_major(planar, 4))
    assert again.equal(planar) and again.stride() == planar.stride() and again.data_ptr() == planar.data_ptr()


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older interface only")
@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ([], True),
        ([("older", False)], False),
        ([("older", False), ("older", True)], True),
        ([("conv", "ieee")], False),
        ([("conv", "tf32")], True),
        ([("cudnn", "ieee"), ("conv", "none")], False),
        ([("cudnn", "tf32"), ("conv", "none")], True),
        ([("all", "ieee"), ("conv", "none")], False),
        ([("all", "tf32"), ("conv", "none")], True),
        ([("all", "ieee"), ("conv", "tf32")], True),
        ([("all", "tf32"), ("conv", "ieee")], False),
        ([("older", True), ("conv", "ieee")], False),
        ([("conv", "ieee"), ("rnn", "tf32")], False),
        ([("conv", "tf32"), ("rnn", "ieee")], True),
    ],
    ids=str,
)
def test_tf32_is_read_by_whichever_interface_it_was_set(precision, settings, allowed):
    for name, value in settings:
        if name == "older":
            torch.backends.cudnn.allow_tf32 = value
        else:
            precision[name].fp32_precision = value
    assert is_tf32_allowed() is allowed


def test_tf32_is_read_in_a_pytorch_with_the_older_interface_only(monkeypatch):
    older = types.SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(torch.backends, "cudnn", older)
    assert not is_tf32_allowed()
    older.allow_tf32 = True
    assert is_tf32_allowed()
