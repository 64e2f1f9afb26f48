"""The experiments by name: the training runs that each of them is made of."""

from __future__ import annotations

from collections.abc import Callable

from gconv.training.recipe import INGREDIENTS

from .runs import Run

TABLE = ("z2cnn", "c-z2cnn", "p4cnn", "g-p4cnn-small", "g-p4cnn", "gc-p4cnn-small", "gc-p4cnn")
IMAGES = (120, 300, 600, 1200, 3000, 6000)
EXPERIMENTS: dict[str, Callable[[str, int], list[Run]]] = {
    "rotmnist": lambda data, seeds: [Run(model, seed, data) for seed in range(seeds) for model in TABLE],
    "data-efficiency": lambda data, seeds: [
        Run(model, seed, data, images=images)
        for seed in range(seeds)
        for images in (*IMAGES, None)
        for model in ("z2cnn", "p4cnn", "gc-p4cnn")
    ],
    "recipes": lambda data, seeds: [
        Run("p4cnn", seed, data, recipe=recipe, epochs=20, held_out=True)
        for seed in range(seeds)
        for recipe in INGREDIENTS
    ],
    "modern": lambda data, seeds: [
        Run(model, seed, data, recipe="modern") for seed in range(seeds) for model in ("p4cnn", "gc-p4cnn")
    ],
}
"""The experiments by name: what they run on a data set, with that many seeds; the first seeds come first."""
