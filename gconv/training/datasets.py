"""The data sets by name: found, downloaded or made, checked, and split into train, validation and test.

Files are looked for in the directory of the environment variable ``GCONV_DATA``, then in the cache. What is downloaded
goes to the cache: the user's cache directory, or the directory of ``GCONV_CACHE``.
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
"""Images ``[N, 28, 28]``, uint8 in 0..255 or float32 in [0, 1], and labels ``[N]``."""


class Split(NamedTuple):
    """Images ``[N, 1, 28, 28]``, float32 in [0, 1], and labels ``[N]``, int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set in the three splits that every experiment uses.

    Attributes:
        name: its name in ``DATASETS``.
        description: what the images are and how they were made.
        train: the images to learn from.
        validation: the images to choose between recipes or networks.
        test: the images for the final score.
        sha256: identifies the data in a training record. It is the hex digest of all pixels as the data set stores them
            (uint8, or float32 where its source has floats), then all labels (int64), each in the order train,
            validation, test.
        classes: the number of classes.
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
        """Train followed by validation, for a training after which nothing is chosen any more."""
        import torch

        return Split(*map(torch.cat, zip(self.train, self.validation, strict=True)))


class Source(NamedTuple):
    """What a name of ``DATASETS`` stands for.

    Attributes:
        description: what the images are and how they were made.
        sizes: the numbers of train, validation and test images.
        folders: where the files may be, below ``GCONV_DATA``; the first is the folder in the cache.
        files: the names of the published files.
        load: returns train, validation and test one after another; its argument is whether to show a progress bar.
    """

    description: str
    sizes: tuple[int, int, int]
    folders: tuple[str, ...]
    files: tuple[str, ...]
    load: Callable[[bool], Arrays]


def load_dataset(name: str, *, progress: bool = True) -> Dataset:
    """Load a data set by its name.

    Args:
        name: a name of ``DATASETS``, in upper or lower case.
        progress: whether downloads show a progress bar on stderr.

    Raises:
        InputError: the name is unknown, ``GCONV_DATA`` is no directory or has a malformed file, or a download failed.
    """
    import torch

    if not isinstance(name, str) or name.lower() not in DATASETS:
        raise one_of("data set", name, DATASETS)
    key = name.lower()
    source = DATASETS[key]
    given = os.environ.get("GCONV_DATA")
    if source.files and given and not os.path.isdir(given):
        raise InputError(f"GCONV_DATA is {given!r}, not a directory; set it to a directory of data files, or unset it")
    pixels, labels = source.load(progress)
    images = np.divide(pixels, 255, dtype=np.float32) if pixels.dtype == np.uint8 else pixels
    both = torch.from_numpy(images[:, None]), torch.from_numpy(labels)
    train, validation, test = map(Split, *(torch.split_with_sizes(tensor, source.sizes) for tensor in both))
    return Dataset(key, source.description, train, validation, test, _digest(pixels, labels))


def rotate(images: NDArray[np.uint8], angles: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Rotate each image by its angle about its centre.

    The interpolation is bilinear in float64, with zeros outside the image, so that a border pixel fades out over one
    pixel and is not cut off. The result is rounded to the nearest integer.

    Args:
        images: ``[N, H, W]``, uint8.
        angles: ``[N]``, in radians, counter-clockwise on the screen.

    Returns:
        ``[N, H, W]``, uint8.

    Raises:
        InputError: the images or the angles have another shape or type.
    """
    if images.dtype != np.uint8 or images.ndim != 3 or angles.shape != images.shape[:1]:
        given = f"{images.dtype} images {list(images.shape)} and angles {list(angles.shape)}"
        raise InputError(f"rotate: {given}; accepted: uint8 images [N, H, W] and angles [N]")
    height, width = images.shape[1:]
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = np.arange(height)[:, None] - middle_y, np.arange(width) - middle_x
    rotated = np.empty_like(images)
    for start in range(0, len(images), 500):  # in blocks, so that the float64 temporaries stay small
        block = slice(start, start + 500)
        cos, sin = np.cos(angles[block])[:, None, None], np.sin(angles[block])[:, None, None]
        # The source of each pixel. Sources outside the image are all zero, so they are moved to just outside it.
        row = np.clip(cos * y + sin * x + middle_y, -1, height)
        column = np.clip(cos * x - sin * y + middle_x, -1, width)
        top, left = np.floor(row).astype(np.intp), np.floor(column).astype(np.intp)
        down, right = row - top, column - left
        padded = np.pad(images[block], ((0, 0), (1, 2), (1, 2)))
        above = np.ravel_multi_index((np.arange(len(padded))[:, None, None], top + 1, left + 1), padded.shape)
        rows = (above, above + padded.shape[2])
        upper, lower = ((1 - right) * padded.take(at) + right * padded.take(at + 1) for at in rows)
        rotated[block] = np.rint((1 - down) * upper + down * lower)
    return rotated


def load_amat(path: str | Path | zipfile.Path) -> Arrays:
    """Read one text file of the official rotated MNIST archive.

    The pixels of an image are taken row by row, in the order of the file, as in the published experiments.

    Returns:
        Images ``[N, 28, 28]``, float32 in [0, 1], and labels ``[N]``.

    Raises:
        InputError: the file cannot be read, or not every line holds 784 numbers in [0, 1] and a label 0..9.
    """
    source = Path(path) if isinstance(path, str) else path
    try:
        # The warning is about an empty file, which is refused below.
        with source.open(encoding="ascii") as lines, warnings.catch_warnings(action="ignore"):
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
    """scikit-learn's 8x8 digits, enlarged 2.5 times in the middle of 28x28 and rotated; no digit occurs twice."""
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    # Bilinear weights of the 8 source pixels, in tenths and thus exact: pixel i lies at (4i - 19) / 10 of the source.
    weights = np.maximum(0, 10 - np.abs(4 * np.arange(28)[:, None] - 19 - 10 * np.arange(8)))
    canvas = weights @ digits.reshape(-1, 8, 8).astype(np.int64) @ weights.T
    images = np.rint(canvas * 255 / 1600).astype(np.uint8)  # of 16 grey levels times 10 x 10
    chosen, angles = draw_images(0, len(labels), len(labels))
    return rotate(images[chosen], angles), labels[chosen].astype(np.int64)


MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
REGEN_SHA256 = "0b60197695301282720b851315fc4dd666677e7b20ea65bd1d230d51165f29d0"


def _rotmnist_regen(progress: bool) -> Arrays:
    """Digits drawn from MNIST's train and test images together, and rotated. As that takes seconds, they are cached."""
    kept = _cache() / "rotmnist-regen.npz"
    with contextlib.suppress(Exception):  # absent or damaged (np.load raises many types): made anew
        with kept.open("rb") as file, np.load(file) as stored:
            images, labels = stored["images"], stored["labels"]
        if _digest(images, labels) == REGEN_SHA256:
            return images, labels
    pool = [read_idx(_fetch("rotmnist-regen", MNIST_URL + name, md5, progress)) for name, md5 in MNIST_MD5.items()]
    images, labels = np.concatenate(pool[::2]), np.concatenate(pool[1::2]).astype(np.int64)
    chosen, angles = draw_images(2007, len(labels), sum(DATASETS["rotmnist-regen"].sizes))
    images, labels = rotate(images[chosen], angles), labels[chosen]
    with contextlib.suppress(InputError), atomic_path(kept) as path:  # cannot be written: made anew next time
        np.savez_compressed(path, images=images, labels=labels)
    return images, labels


ROTMNIST_URL = "http://www.iro.umontreal.ca/~lisa/icml2007data/mnist_rotation_new.zip"
ROTMNIST_MD5 = "0f9a947ff3d30e95cd685462cbf3b847"  # not published by its authors; other public loaders check the same
ROTMNIST_ROWS = {
    "mnist_all_rotation_normalized_float_train_valid.amat": 12_000,
    "mnist_all_rotation_normalized_float_test.amat": 50_000,
}


def _rotmnist(progress: bool) -> Arrays:
    """The official archive, from its two text files, or from the zip that has them, which is not unpacked."""
    parts = []
    for file, rows in ROTMNIST_ROWS.items():
        path: Path | zipfile.Path | None = next(_given("rotmnist", file), None)
        path = path or zipfile.Path(_fetch("rotmnist", ROTMNIST_URL, ROTMNIST_MD5, progress), file)
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
        (10_000, 2_000, 50_000), ("mnist",), tuple(MNIST_MD5), _rotmnist_regen,
    ),
    "rotmnist": Source(
        "The official rotated MNIST archive (Larochelle et al., ICML 2007; the corrected mnist_rotation_new).",
        (10_000, 2_000, 50_000), ("mnist_rotation_new", "rotmnist"), tuple(ROTMNIST_ROWS), _rotmnist,
    ),
}  # fmt: skip
"""The known data sets by name. A new data set is one entry here."""


def _fetch(dataset: str, url: str, md5: str, progress: bool) -> Path:
    """The file of an address and an md5: from ``GCONV_DATA``, else from the cache, else downloaded to the cache."""
    import pooch  # not at the top: it imports a progress bar that warns in notebooks without widgets

    file = url.rpartition("/")[2]
    passed_over = ""
    for path in _given(dataset, file):
        if pooch.file_hash(str(path), alg="md5") == md5:
            return path
        passed_over = f"{path} is damaged or another file, as its md5 is not the published one; "
    pooch.get_logger().setLevel("WARNING")  # otherwise it reports every file, besides the progress bar
    target = _cache() / DATASETS[dataset].folders[0]
    try:
        return Path(pooch.retrieve(url, f"md5:{md5}", fname=file, path=target, progressbar=progress))
    except (OSError, ValueError) as error:  # the errors of requests are OSErrors, and a wrong hash is a ValueError
        reason = "not the published file: its md5 differs" if isinstance(error, ValueError) else type(error).__name__
        raise InputError(
            f"data set {dataset}: {passed_over}cannot download {url} to {target} ({reason}); "
            f"instead, set GCONV_DATA to a directory with the published {', '.join(DATASETS[dataset].files)}, "
            "or use rotdigits, which needs no network"
        ) from None


def _given(dataset: str, file: str) -> Iterator[Path]:
    """The file in ``GCONV_DATA``, if that is set: in the folders of the data set, or in the directory itself."""
    if given := os.environ.get("GCONV_DATA"):
        places = (Path(given, folder, file) for folder in (*DATASETS[dataset].folders, ""))
        yield from filter(Path.is_file, places)


def _cache() -> Path:
    import pooch

    return Path(os.environ.get("GCONV_CACHE") or pooch.os_cache("gconv"))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes: two zeros, the type 8, the number of axes, their lengths, the values."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def draw_images(seed: int, pool: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """``count`` random indices below ``pool``, none twice, and a random angle in [0, 2 pi) for each."""
    rng = np.random.default_rng(seed)
    return rng.permutation(pool)[:count], rng.uniform(0, 2 * np.pi, size=count)


def _digest(images: NDArray[Any], labels: NDArray[np.int64]) -> str:
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
