"""The experiments: the training runs of each, by its name."""

from __future__ import annotations

from collections.abc import Callable

from gconv.training.recipe import INGREDIENTS

from .runs import Run

TABLE = ("z2cnn", "c-z2cnn", "p4cnn", "g-p4cnn-small", "g-p4cnn", "gc-p4cnn-small", "gc-p4cnn")
"""The models of the published table, in its order."""

IMAGES = (120, 300, 600, 1200, 3000, 6000)
"""The numbers of training images of ``data-efficiency``, besides all of them."""

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
"""By name, a function of the data set and the number of seeds that lists the runs, those of the first seed first."""
