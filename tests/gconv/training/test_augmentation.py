"""Augmentation: exact where it can be, and against a slow twin by scipy elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from gconv.training.augmentation import DRAWS, augment
from gconv.training.datasets import rotate

few = settings(max_examples=25)
shares = st.floats(0, 1, exclude_max=True)
sizes = st.tuples(st.integers(2, 9), st.integers(2, 9))


def draws(angle: float = 0.0, scale: float = 0.5, shears: tuple = (0.5, 0.5), shifts: tuple = (0.5, 0.5)) -> Tensor:
    return torch.tensor([[angle, scale, *shears, *shifts]], dtype=torch.float64)


def pictures(count: int, height: int = 7, width: int = 7) -> Tensor:
    return torch.rand(count, 2, height, width, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["rotation", "affine"])
@pytest.mark.parametrize("quarters", range(4))
def test_quarter_turns_are_exact_and_counter_clockwise(kind, quarters):
    images = pictures(3)
    turned = augment(images, draws(quarters / 4).expand(3, -1), kind)
    close(turned, torch.rot90(images, quarters, (2, 3)))


@pytest.mark.parametrize("quarters", range(4))
def test_in_single_precision_too(quarters):
    images = torch.rand(2, 1, 28, 28)
    turned = augment(images, draws(quarters / 4).float().expand(2, -1), "rotation")
    assert turned.dtype == torch.float32
    close(turned, torch.rot90(images, quarters, (2, 3)), 1e-5)


@few
@given(angle=shares, seed=st.integers(0, 99))
def test_it_turns_as_the_data_sets_were_made(angle, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (1, 9, 9), dtype=np.uint8)
    expected = rotate(pixels, np.array([2 * math.pi * angle]))
    turned = augment(torch.tensor(pixels[:, None], dtype=torch.float64), draws(angle), "rotation")
    assert np.abs(turned[:, 0].numpy() - expected).max() <= 0.5 + 1e-6  # those are rounded


def test_none_takes_the_images_as_they_are():
    images = pictures(2)
    assert augment(images, torch.rand(2, DRAWS), "none") is images


def test_draws_of_zero_turn_by_nothing():
    images = pictures(2, 5, 8)
    close(augment(images, torch.zeros(2, DRAWS), "rotation"), images)


@few
@given(angle=shares, size=sizes)
def test_affine_with_the_other_draws_in_the_middle_is_rotation(angle, size):
    images = pictures(1, *size)
    close(augment(images, draws(angle), "affine"), augment(images, draws(angle), "rotation"))


@few
@given(angle=shares, others=st.tuples(shares, shares, shares, shares, shares))
def test_rotation_takes_the_first_draw_alone(angle, others):
    images = pictures(1)
    scale, a, b, c, d = others
    close(augment(images, draws(angle, scale, (a, b), (c, d)), "rotation"), augment(images, draws(angle), "rotation"))


@settings(max_examples=15)
@given(size=sizes, drawn=st.lists(shares, min_size=DRAWS, max_size=DRAWS))
def test_the_map_is_the_one_that_is_described(size, drawn):
    """Against scipy in pixels, for images of any shape: scaled and sheared by up to a tenth, then turned and moved.

    Output pixels look back to where they come from.
    """
    height, width = size
    angle = 2 * math.pi * drawn[0]
    scale, *shears = (0.1 * (2 * draw - 1) for draw in drawn[1:4])
    shift = np.array([(2 * drawn[5] - 1) / 14 * height, (2 * drawn[4] - 1) / 14 * width])  # of rows, of columns
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    shear = np.array([[1, shears[1]], [shears[0], 1]])
    matrix = turn @ shear * (1 + scale)
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    image = pictures(1, height, width)
    around = np.pad(image[0].numpy(), ((0, 0), (30, 30), (30, 30)))
    expected = [
        ndimage.affine_transform(part, matrix, middle + 30 + shift - matrix @ (middle + 30), order=1)[30:-30, 30:-30]
        for part in around
    ]
    close(augment(image, torch.tensor([drawn], dtype=torch.float64), "affine")[0], torch.tensor(np.array(expected)))


def test_the_extremes_have_the_stated_size():
    """Where the edges of a square of 28 pixels in the middle of 140 come to lie, by their centre and second moment."""
    image = torch.zeros(1, 1, 140, 140, dtype=torch.float64)
    image[..., 56:84, 56:84] = 1
    position = torch.arange(140, dtype=torch.float64) - 69.5

    def moments(**drawn) -> tuple[float, float, float, float]:
        ink = augment(image, draws(**drawn), "affine")[0, 0]
        down, right = (ink.sum(1) * position).sum() / ink.sum(), (ink.sum(0) * position).sum() / ink.sum()
        mixed = (ink * position[:, None] * position).sum() / ink.sum()
        return float(ink.sum()), float(down), float(right), float(mixed)

    area, *centre, mixed = moments()
    assert (area, *centre, mixed) == pytest.approx((784, 0, 0, 0), abs=1e-6)
    assert moments(scale=0.0)[0] == pytest.approx(784 / 0.9**2, rel=5e-3)
    assert moments(scale=1.0)[0] == pytest.approx(784 / 1.1**2, rel=5e-3)
    assert moments(shifts=(1.0, 0.5))[1:3] == pytest.approx((0, -10), abs=1e-6)  # a fourteenth of 140, to the left
    assert moments(shifts=(0.5, 0.0))[1:3] == pytest.approx((10, 0), abs=1e-6)
    for shears in ((1.0, 0.5), (0.5, 1.0)):
        assert moments(shears=shears)[3] == pytest.approx(-0.1 * 28**2 / 12, rel=1e-2)


def test_every_image_has_its_own_map():
    images, drawn = pictures(4), torch.rand(4, DRAWS, dtype=torch.float64)
    together = augment(images, drawn, "affine")
    for i in range(4):
        close(together[i], augment(images[i : i + 1], drawn[i : i + 1], "affine")[0])


def test_the_scale_of_the_picture_does_not_change():
    images = pictures(2)
    drawn = torch.rand(2, DRAWS, dtype=torch.float64)
    close(augment(5 * images, drawn, "affine"), 5 * augment(images, drawn, "affine"))
    assert augment(images, drawn, "affine").max() <= images.max()
