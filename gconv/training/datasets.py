"""The data sets by name: found, downloaded or made, always checked, and cut into train, validation and test.

Files are looked for in the directory that ``GCONV_DATA`` names, then in the cache, which downloads fill: the user's
cache directory, or the one that ``GCONV_CACHE`` names.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gconv.system.errors import InputError, one_of
from gconv.system.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

Arrays = tuple[NDArray[Any], NDArray[np.int64]]
"""Images [N, 28, 28], uint8 in 0..255 or float32 in [0, 1], and labels [N]."""


class Split(NamedTuple):
    """Images [N, 1, 28, 28], float32 in [0, 1], and labels [N], int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set cut into the three splits that every experiment uses.

    ``sha256`` names the data in a training record: the hex digest over all pixels as the data set stores them (uint8,
    or float32 if its source is in floats) and then all labels (int64), each with train, validation and test in a row.
    """

    name: str
    description: str
    train: Split
    validation: Split
    test: Split
    sha256: str
    classes: int = 10

    @property
    def train_and_validation(self) -> Split:
        """Train followed by validation, for the final training once nothing is chosen any more."""
        import torch

        return Split(*map(torch.cat, zip(self.train, self.validation, strict=True)))


class Source(NamedTuple):
    """What a name stands for: ``files`` are looked for in ``folders``; ``load``, which may show a progress bar,
    returns train, validation and test in a row."""

    description: str
    sizes: tuple[int, int, int]
    folders: tuple[str, ...]
    files: tuple[str, ...]
    load: Callable[[bool], Arrays]


def load_dataset(name: str, *, progress: bool = True) -> Dataset:
    """Load a data set of ``DATASETS`` by name, in any case; ``progress`` shows a bar on stderr while it downloads.

    Raises:
        InputError: an unknown name; a ``GCONV_DATA`` that is no directory or holds a malformed file; a failed download.
    """
    import torch

    if not isinstance(name, str) or name.lower() not in DATASETS:
        raise one_of("data set", name, DATASETS)
    key = name.lower()
    source = DATASETS[key]
    given = os.environ.get("GCONV_DATA")
    if source.files and given and not os.path.isdir(given):
        raise InputError(f"GCONV_DATA is {given!r}, not a directory; accepted: a directory of data files, or unset")
    pixels, labels = source.load(progress)
    images = np.divide(pixels, 255, dtype=np.float32) if pixels.dtype == np.uint8 else pixels
    both = torch.from_numpy(images[:, None]), torch.from_numpy(labels)
    train, validation, test = map(Split, *(torch.split_with_sizes(tensor, source.sizes) for tensor in both))
    return Dataset(key, source.description, train, validation, test, _digest(pixels, labels))


def rotate(images: NDArray[np.uint8], angles: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Turn each image [N, H, W] by its angle [N] in radians, counter-clockwise as displayed, about the image's centre.

    Bilinear in float64, with zeros all around the image (so a border pixel fades out over one pixel and is not cut
    off), rounded to the nearest integer.

    Raises:
        InputError: the images are not uint8 [N, H, W], or there is not one angle for each.
    """
    if images.dtype != np.uint8 or images.ndim != 3 or angles.shape != images.shape[:1]:
        given = f"{images.dtype} images {list(images.shape)} and angles {list(angles.shape)}"
        raise InputError(f"rotate: {given}; accepted: uint8 images [N, H, W] and angles [N]")
    height, width = images.shape[1:]
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = np.arange(height)[:, None] - middle_y, np.arange(width) - middle_x
    turned = np.empty_like(images)
    for start in range(0, len(images), 500):  # in blocks, so that the float64 temporaries stay small
        block = slice(start, start + 500)
        cos, sin = np.cos(angles[block])[:, None, None], np.sin(angles[block])[:, None, None]
        # Each pixel looks back to where it came from; from beyond the border it sees zero, wherever exactly that is.
        row = np.clip(cos * y + sin * x + middle_y, -1, height)
        column = np.clip(cos * x - sin * y + middle_x, -1, width)
        top, left = np.floor(row).astype(np.intp), np.floor(column).astype(np.intp)
        down, right = row - top, column - left
        padded = np.pad(images[block], ((0, 0), (1, 2), (1, 2)))
        above = np.ravel_multi_index((np.arange(len(padded))[:, None, None], top + 1, left + 1), padded.shape)
        rows = (above, above + padded.shape[2])
        upper, lower = ((1 - right) * padded.take(at) + right * padded.take(at + 1) for at in rows)
        turned[block] = np.rint((1 - down) * upper + down * lower)
    return turned


def load_amat(path: str | Path | zipfile.Path) -> Arrays:
    """Read one text file of the official rotated MNIST: images [N, 28, 28] float32 in [0, 1] and labels [N].

    Pixels keep the file's order, row by row, as published experiments on the archive read them.

    Raises:
        InputError: the file cannot be read, or not every line holds 784 numbers in [0, 1] and a label 0..9.
    """
    source = Path(path) if isinstance(path, str) else path
    try:
        with source.open(encoding="ascii") as lines, warnings.catch_warnings(action="ignore"):  # if empty: see below
            table = np.loadtxt(lines, dtype=np.float32, comments=None, ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as rotated MNIST: {error}") from None
    if not len(table) or table.shape[1] != 785:
        raise InputError(f"{path}: {len(table)} lines of {table.shape[1]} numbers; expected 784 pixels and a label")
    pixels, labels = np.ascontiguousarray(table[:, :-1]), table[:, -1]
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise InputError(f"{path}: pixels from {pixels.min():g} to {pixels.max():g}; expected numbers in [0, 1]")
    if not np.isin(labels, np.arange(10)).all():
        raise InputError(f"{path}: labels from {labels.min():g} to {labels.max():g}; expected whole numbers 0..9")
    return pixels.reshape(-1, 28, 28), labels.astype(np.int64)


def _rotdigits(progress: bool) -> Arrays:
    """scikit-learn's 8x8 digits, enlarged 2.5 times in the middle of 28x28 and turned; no digit occurs twice."""
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    # Bilinear weights of the 8 source pixels, in tenths and thus exact: pixel i lies at (4i - 19) / 10 of the source.
    weights = np.maximum(0, 10 - np.abs(4 * np.arange(28)[:, None] - 19 - 10 * np.arange(8)))
    canvas = weights @ digits.reshape(-1, 8, 8).astype(np.int64) @ weights.T
    images = np.rint(canvas * 255 / 1600).astype(np.uint8)  # of 16 grey levels times 10 x 10
    chosen, angles = _draw(0, len(labels), len(labels))
    return rotate(images[chosen], angles), labels[chosen].astype(np.int64)


_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_REGEN_SHA256 = "0b60197695301282720b851315fc4dd666677e7b20ea65bd1d230d51165f29d0"


def _rotmnist_regen(progress: bool) -> Arrays:
    """MNIST's train and test pooled, drawn from and turned; kept in the cache, as turning takes seconds."""
    kept = _cache() / "rotmnist-regen.npz"
    with contextlib.suppress(Exception):  # absent; or damaged, for which np.load has no one exception: made again
        with kept.open("rb") as file, np.load(file) as stored:
            images, labels = stored["images"], stored["labels"]
        if _digest(images, labels) == _REGEN_SHA256:
            return images, labels
    pool = [_read_idx(_fetch("rotmnist-regen", _MNIST_URL + name, md5, progress)) for name, md5 in _MNIST_MD5.items()]
    images, labels = np.concatenate(pool[::2]), np.concatenate(pool[1::2]).astype(np.int64)
    chosen, angles = _draw(2007, len(labels), sum(DATASETS["rotmnist-regen"].sizes))
    images, labels = rotate(images[chosen], angles), labels[chosen]
    with contextlib.suppress(InputError), atomic_path(kept) as path:  # unwritable: made again next time
        np.savez_compressed(path, images=images, labels=labels)
    return images, labels


_ROTMNIST_URL = "http://www.iro.umontreal.ca/~lisa/icml2007data/mnist_rotation_new.zip"
_ROTMNIST_MD5 = "0f9a947ff3d30e95cd685462cbf3b847"  # its authors publish none; this is what other public loaders check
_ROTMNIST_ROWS = {
    "mnist_all_rotation_normalized_float_train_valid.amat": 12_000,
    "mnist_all_rotation_normalized_float_test.amat": 50_000,
}


def _rotmnist(progress: bool) -> Arrays:
    """The official archive, from its two text files or, read in place, from the zip that holds them."""
    parts = []
    for file, rows in _ROTMNIST_ROWS.items():
        path: Path | zipfile.Path | None = next(_given("rotmnist", file), None)
        path = path or zipfile.Path(_fetch("rotmnist", _ROTMNIST_URL, _ROTMNIST_MD5, progress), file)
        parts.append(load_amat(path))
        if len(parts[-1][1]) != rows:
            raise InputError(f"{path}: {len(parts[-1][1])} lines; the official file has {rows}")
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


DATASETS: dict[str, Source] = {
    "rotdigits": Source(
        "scikit-learn's 1,797 digits of 8x8 pixels, enlarged to 28x28 and each turned by one random angle: "
        "for tests and demonstrations without a network, not a published benchmark.",
        (997, 200, 600), (), (), _rotdigits,
    ),
    "rotmnist-regen": Source(
        "Rotated MNIST regenerated from MNIST by the published recipe, not the official archive: the draws of digits "
        "and angles differ, so errors on it are not digit-for-digit comparable with published ones.",
        (10_000, 2_000, 50_000), ("mnist",), tuple(_MNIST_MD5), _rotmnist_regen,
    ),
    "rotmnist": Source(
        "The official rotated MNIST archive (Larochelle et al., ICML 2007; the corrected mnist_rotation_new).",
        (10_000, 2_000, 50_000), ("mnist_rotation_new", "rotmnist"), tuple(_ROTMNIST_ROWS), _rotmnist,
    ),
}  # fmt: skip
"""The known data sets by name; a new one is one entry here."""


def _fetch(dataset: str, url: str, md5: str, progress: bool) -> Path:
    """The file of that address, with that md5: from ``GCONV_DATA``, else from the cache, else downloaded into it."""
    import pooch  # here, as it brings a progress bar that warns in notebooks without widgets

    file = url.rpartition("/")[2]
    passed_over = ""
    for path in _given(dataset, file):
        if pooch.file_hash(str(path), alg="md5") == md5:
            return path
        passed_over = f"{path} is damaged or another file, as its md5 is not the published one; "
    pooch.get_logger().setLevel("WARNING")  # it would report every file; the progress bar is enough
    target = _cache() / DATASETS[dataset].folders[0]
    try:
        return Path(pooch.retrieve(url, f"md5:{md5}", fname=file, path=target, progressbar=progress))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        reason = "not the published file: its md5 differs" if isinstance(error, ValueError) else type(error).__name__
        raise InputError(
            f"data set {dataset}: {passed_over}cannot download {url} to {target} ({reason}); "
            f"instead, set GCONV_DATA to a directory with the published {', '.join(DATASETS[dataset].files)}, "
            "or use rotdigits, which needs no network"
        ) from None


def _given(dataset: str, file: str) -> Iterator[Path]:
    """Where ``GCONV_DATA``, if set, holds the file: in the data set's folders of it, then in itself."""
    if given := os.environ.get("GCONV_DATA"):
        places = (Path(given, folder, file) for folder in (*DATASETS[dataset].folders, ""))
        yield from filter(Path.is_file, places)


def _cache() -> Path:
    import pooch

    return Path(os.environ.get("GCONV_CACHE") or pooch.os_cache("gconv"))


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of bytes: two zeros, the type 8, the number of axes, each axis's length, the values."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def _draw(seed: int, pool: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which ``count`` of ``pool`` pictures, none twice, and by what angle in [0, 2 pi) each is turned."""
    rng = np.random.default_rng(seed)
    return rng.permutation(pool)[:count], rng.uniform(0, 2 * np.pi, size=count)


def _digest(images: NDArray[Any], labels: NDArray[np.int64]) -> str:
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
