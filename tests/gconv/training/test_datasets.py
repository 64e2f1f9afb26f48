"""The data sets: what they hold is pinned, what is damaged is told, and nothing here needs a network."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import logging
import os
import socket
import threading
import zipfile
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from gconv.system.errors import InputError
from gconv.training import datasets as data
from gconv.training.datasets import DATASETS, load_amat, load_dataset, rotate

GIVEN = os.environ.get("GCONV_DATA", "")
ROTDIGITS_SHA256 = "ec3a3a72ee108381dfb77f3eb18c293109e467c9a453d96b43558da007662eda"
SIZES = (20, 4, 36)  # of the miniature MNIST below


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """No test sees the user's data or cache, or goes through a proxy to reach its own server."""
    monkeypatch.delenv("GCONV_DATA", raising=False)
    monkeypatch.setenv("GCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


# --- rotation


def test_rotating_by_nothing_changes_nothing():
    images = pictures(7)
    np.testing.assert_array_equal(rotate(images, np.zeros(7)), images)


@pytest.mark.parametrize("quarters", range(-4, 9))
def test_quarter_turns_are_exact_and_counter_clockwise(quarters):
    images = pictures(5)
    turned = rotate(images, np.full(5, quarters * np.pi / 2))
    np.testing.assert_array_equal(turned, np.rot90(images, quarters, axes=(1, 2)))


def test_an_eighth_turn_spreads_a_pixel_by_bilinear_weights():
    image = np.zeros((1, 3, 3), dtype=np.uint8)
    image[0, 0, 1] = 200  # above the centre
    turned = rotate(image, np.array([np.pi / 4]))[0]
    near, far = 1 - np.sqrt(0.5), np.sqrt(0.5)
    # The left neighbour of the centre looks back to (-sqrt(1/2), -sqrt(1/2)), the corner above it to (-sqrt 2, 0).
    assert turned[1, 0] == np.rint(200 * far * near)
    assert turned[0, 0] == np.rint(200 * (2 - np.sqrt(2)))
    assert turned[0, 1] == np.rint(200 * far * near)
    assert turned[2].max() == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), angle=st.floats(-10, 10))
def test_rotation_agrees_with_scipy_on_zeros_around_the_image(seed, angle):
    image = pictures(1, seed)
    around = np.pad(image[0].astype(float), 10)  # scipy cuts at the border; zeros around it make the border fade out
    expected = ndimage.rotate(around, np.degrees(angle), reshape=False, order=1)[10:-10, 10:-10]
    assert np.abs(rotate(image, np.array([angle]))[0] - expected).max() <= 0.5 + 1e-6


@settings(max_examples=30, deadline=None)
@given(angle=st.floats(0, 6.3), quarters=st.integers(1, 3))
def test_rotation_commutes_with_quarter_turns(angle, quarters):
    images = pictures(2)
    first = rotate(np.rot90(images, quarters, axes=(1, 2)).copy(), np.full(2, angle)).astype(int)
    last = np.rot90(rotate(images, np.full(2, angle)), quarters, axes=(1, 2)).astype(int)
    assert np.abs(first - last).max() <= 1  # a sum that ends in .5 may round either way


def test_each_image_turns_by_its_own_angle_across_blocks():
    images, angles = pictures(501), np.random.default_rng(1).uniform(0, 6.3, 501)
    turned = rotate(images, angles)
    for index in (0, 499, 500):
        np.testing.assert_array_equal(turned[index], rotate(images[[index]], angles[[index]])[0])


@pytest.mark.parametrize(
    ("images", "angles"),
    [
        (np.zeros((2, 28, 28)), np.zeros(2)),
        (np.zeros((2, 28, 28), np.uint8), np.zeros(3)),
        (np.zeros((28, 28), np.uint8), np.zeros(28)),
    ],
)
def test_rotate_refuses_other_types_and_shapes(images, angles):
    with pytest.raises(InputError, match="accepted: uint8 images"):
        rotate(images, angles)


# --- names


def test_known_names_in_order():
    assert list(DATASETS) == ["rotdigits", "rotmnist-regen", "rotmnist"]


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(InputError, match="unknown data set 'mnist'; accepted: rotdigits, rotmnist-regen, rotmnist"):
        load_dataset("mnist")


def test_descriptions_say_what_a_set_is_not():
    assert "not the official archive" in DATASETS["rotmnist-regen"].description
    assert "not a published benchmark" in DATASETS["rotdigits"].description


# --- rotdigits


def test_rotdigits_is_pinned_and_the_same_every_time():
    first, second = load_dataset("rotdigits"), load_dataset("RotDigits")
    assert (first.name, second.name) == ("rotdigits", "rotdigits")
    assert first.sha256 == second.sha256 == ROTDIGITS_SHA256
    assert torch.equal(first.train.images, second.train.images)


def test_rotdigits_shapes_types_and_range():
    digits = load_dataset("rotdigits")
    for split, size in zip((digits.train, digits.validation, digits.test), (997, 200, 600), strict=True):
        assert split.images.shape == (size, 1, 28, 28)
        assert split.images.dtype == torch.float32
        assert split.labels.shape == (size,)
        assert split.labels.dtype == torch.int64
        assert split.images.amin() == 0
        assert 0.9 < split.images.amax() <= 1
        assert set(split.labels.tolist()) == set(range(digits.classes))


def test_the_digest_is_over_all_pixels_and_then_all_labels():
    digits = load_dataset("rotdigits")
    splits = (digits.train, digits.validation, digits.test)
    pixels = [(split.images * 255).round().to(torch.uint8).numpy().tobytes() for split in splits]
    labels = [split.labels.numpy().tobytes() for split in splits]
    assert hashlib.sha256(b"".join(pixels + labels)).hexdigest() == digits.sha256


def test_train_and_validation_is_one_after_the_other():
    digits = load_dataset("rotdigits")
    images, labels = digits.train_and_validation
    assert torch.equal(images[:997], digits.train.images)
    assert torch.equal(images[997:], digits.validation.images)
    assert torch.equal(labels[:997], digits.train.labels)
    assert torch.equal(labels[997:], digits.validation.labels)


def test_every_digit_is_in_one_split_of_rotdigits_with_its_own_label(monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setattr(data, "rotate", lambda images, angles: images)
    digits = load_dataset("rotdigits")
    splits = (digits.train, digits.validation, digits.test)
    source, labels = load_digits(return_X_y=True)
    # Source pixel (r, c) lies at (4.75 + 2.5 r, 4.75 + 2.5 c) of the canvas: the pixels nearest to these tell which
    # of the source digits an upright picture shows.
    at = np.rint(4.75 + 2.5 * np.arange(8)).astype(int)
    coarse = torch.cat([split.images for split in splits])[:, 0, at][:, :, at].flatten(1).numpy()
    shown = _correlation(coarse, source).argmax(axis=1)
    assert sorted(shown.tolist()) == list(range(1797))
    assert labels[shown].tolist() == torch.cat([split.labels for split in splits]).tolist()


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (m - m.mean(axis=1, keepdims=True) for m in (a, b))
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


def test_no_turn_cuts_ink_off_a_digit(monkeypatch):
    turned = load_dataset("rotdigits")
    monkeypatch.setattr(data, "rotate", lambda images, angles: images)
    upright = load_dataset("rotdigits")
    ink = [digits.train.images.sum(dim=(1, 2, 3)) for digits in (turned, upright)]
    assert ((ink[0] - ink[1]).abs() / ink[1]).max() < 0.01


# --- rotmnist-regen, on a miniature MNIST


def gz_idx(values: np.ndarray) -> bytes:
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes())


@pytest.fixture
def mnist(monkeypatch, tmp_path):
    """A folder with an MNIST of 50 + 20 pictures, each with its own label, that stands for the published one."""
    folder = tmp_path / "published"
    folder.mkdir()
    images, labels = pictures(70), np.arange(70, dtype=np.uint8)
    parts = (images[:50], labels[:50], images[50:], labels[50:])
    contents = dict(zip(data.MNIST_MD5, map(gz_idx, parts), strict=True))
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    monkeypatch.setattr(data, "MNIST_MD5", {file: hashlib.md5(c).hexdigest() for file, c in contents.items()})
    monkeypatch.setitem(DATASETS, "rotmnist-regen", DATASETS["rotmnist-regen"]._replace(sizes=SIZES))
    return folder


@pytest.fixture
def closed_port(monkeypatch):
    """All downloads go to an address at which nothing answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    monkeypatch.setattr(data, "MNIST_URL", url)
    monkeypatch.setattr(data, "ROTMNIST_URL", f"{url}mnist_rotation_new.zip")
    return url


@pytest.fixture
def server(monkeypatch, mnist):
    """The miniature MNIST served from this machine; a list of the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(mnist))

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(data, "MNIST_URL", f"http://127.0.0.1:{httpd.server_address[1]}/")
        yield asked
        httpd.shutdown()


def test_the_recipe_draws_what_was_published_of_it():
    """The first sources and angles of each split, as rotmnist-regen has them."""
    chosen, angles = data.draw_images(2007, 70_000, 62_000)
    assert chosen[[0, 1, 2, 12_000]].tolist() == [69784, 67962, 33351, 6128]
    np.testing.assert_allclose(angles[[0, 1, 2, 12_000]], [0.04918569, 1.42195708, 2.00468158, 0.32112303], atol=1e-8)
    assert len(set(chosen.tolist())) == 62_000
    assert angles.min() >= 0
    assert angles.max() < 2 * np.pi


def test_regen_pools_train_and_test_and_turns_each_picture_by_its_angle(monkeypatch, mnist):
    monkeypatch.setenv("GCONV_DATA", str(mnist))
    regen = load_dataset("RotMNIST-regen")
    assert [len(s.labels) for s in (regen.train, regen.validation, regen.test)] == list(SIZES)
    images = torch.cat([regen.train_and_validation.images, regen.test.images])
    labels = torch.cat([regen.train_and_validation.labels, regen.test.labels])
    chosen, angles = data.draw_images(2007, 70, 60)
    assert labels.tolist() == chosen.tolist()  # in the miniature, a picture's label is its number
    expected = rotate(pictures(70)[chosen], angles)
    np.testing.assert_array_equal((images * 255).round().numpy()[:, 0], expected)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_an_idx_file_is_read_with_its_shape(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "x.gz").write_bytes(gz_idx(values))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "x.gz"), values)


def test_files_in_the_mnist_folder_of_gconv_data_are_found_first(monkeypatch, mnist, closed_port):
    for file in data.MNIST_MD5:
        (mnist / "mnist").mkdir(exist_ok=True)
        (mnist / file).rename(mnist / "mnist" / file)
        (mnist / file).write_bytes(b"not this one")
    monkeypatch.setenv("GCONV_DATA", str(mnist))
    assert load_dataset("rotmnist-regen").train.images.shape == (20, 1, 28, 28)


def test_a_given_file_with_another_md5_is_passed_over(monkeypatch, mnist, closed_port):
    file = "t10k-labels-idx1-ubyte.gz"
    (mnist / file).write_bytes(gz_idx(np.zeros(20, np.uint8)))
    monkeypatch.setenv("GCONV_DATA", str(mnist))
    with pytest.raises(InputError, match=f"cannot download {closed_port}{file}"):
        load_dataset("rotmnist-regen", progress=False)


def test_downloads_are_kept_and_not_asked_for_twice(server, tmp_path):
    digest = load_dataset("rotmnist-regen", progress=False).sha256
    (tmp_path / "cache" / "rotmnist-regen.npz").unlink()
    assert load_dataset("rotmnist-regen", progress=False).sha256 == digest
    assert len(server) == 4
    assert files_below(tmp_path / "cache" / "mnist") == sorted(data.MNIST_MD5)


@pytest.mark.parametrize("progress", [False, True])
def test_a_download_shows_its_progress_on_stderr_and_nothing_else(server, monkeypatch, capsys, progress):
    logged = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(pooch.get_logger(), "handlers", [logged])
    load_dataset("rotmnist-regen", progress=progress)
    out, err = capsys.readouterr()
    assert (out, logged.stream.getvalue()) == ("", "")
    assert ("100%" in err) == progress
    assert progress or not err


def test_a_download_with_another_md5_is_refused_and_not_kept(server, mnist, tmp_path):
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(b"an error page, say")
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.gz .*not the published file: its md5 differs"):
        load_dataset("rotmnist-regen", progress=False)
    assert files_below(tmp_path / "cache") == []


def test_an_address_that_is_gone_is_told(server, mnist, tmp_path):
    (mnist / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputError, match="HTTPError"):
        load_dataset("rotmnist-regen", progress=False)
    assert files_below(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["rotmnist-regen", "rotmnist"])
def test_without_a_network_one_line_names_the_alternatives(name, closed_port, tmp_path):
    with pytest.raises(InputError) as caught:
        load_dataset(name, progress=False)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data set {name}: cannot download {closed_port}")
    for part in ("ConnectionError", "GCONV_DATA", "rotdigits", *DATASETS[name].files):
        assert part in message
    assert caught.value.__suppress_context__
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("name", ["rotmnist-regen", "rotmnist"])
def test_gconv_data_must_be_a_directory(name, monkeypatch, tmp_path):
    monkeypatch.setenv("GCONV_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"GCONV_DATA is '.*nowhere', not a directory"):
        load_dataset(name)
    assert load_dataset("rotdigits").sha256 == ROTDIGITS_SHA256  # it needs no files


@pytest.fixture
def kept(monkeypatch, mnist, tmp_path):
    """The cached miniature, whose digest is the pinned one."""
    monkeypatch.setenv("GCONV_DATA", str(mnist))
    monkeypatch.setattr(data, "REGEN_SHA256", load_dataset("rotmnist-regen").sha256)
    return tmp_path / "cache" / "rotmnist-regen.npz"


def test_the_turned_pictures_are_kept(monkeypatch, kept):
    def fail(*args):
        raise AssertionError("turned again")

    monkeypatch.setattr(data, "rotate", fail)
    assert load_dataset("rotmnist-regen").sha256 == data.REGEN_SHA256
    assert files_below(kept.parent) == [kept.name]


def damaged(content: bytes) -> list[bytes]:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return [b"", b"junk", content[:1000], bytes(flipped)]


@pytest.mark.parametrize("damage", range(4), ids=["empty", "junk", "cut", "flipped"])
def test_a_damaged_cache_is_made_again(kept, damage):
    whole = kept.read_bytes()
    kept.write_bytes(damaged(whole)[damage])
    assert load_dataset("rotmnist-regen").sha256 == data.REGEN_SHA256
    assert kept.read_bytes() == whole


def test_a_cache_of_other_pictures_is_made_again(kept):
    np.savez(kept, images=pictures(60, seed=9), labels=np.arange(60))
    assert load_dataset("rotmnist-regen").sha256 == data.REGEN_SHA256


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, kept, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GCONV_CACHE", str(tmp_path / "file" / "cache"))
    assert load_dataset("rotmnist-regen").sha256 == data.REGEN_SHA256
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(
    not (Path(GIVEN, "rotmnist-regen.npz").is_file() and Path(GIVEN, "mnist").is_dir()),
    reason="GCONV_DATA does not hold mnist/ and rotmnist-regen.npz",
)
def test_regen_equals_the_reference_of_it(monkeypatch, tmp_path):
    """Made from MNIST twice over: sources, labels and angles are equal, pixels too but for a rare rounding."""
    monkeypatch.setenv("GCONV_DATA", GIVEN)
    regen = load_dataset("rotmnist-regen", progress=False)
    assert regen.sha256 == data.REGEN_SHA256
    assert (tmp_path / "cache" / "rotmnist-regen.npz").is_file()
    with np.load(Path(GIVEN, "rotmnist-regen.npz")) as reference:
        chosen, angles = data.draw_images(2007, 70_000, 62_000)
        for part, split, rows in (("train", regen.train_and_validation, 12_000), ("test", regen.test, 50_000)):
            at = slice(0, rows) if part == "train" else slice(12_000, None)
            np.testing.assert_array_equal(reference[f"src_{part}"], chosen[at])
            np.testing.assert_array_equal(reference[f"angle_{part}"], angles[at])
            np.testing.assert_array_equal(reference[f"y_{part}"], split.labels.numpy())
            pixels = (split.images[:, 0] * 255).round().to(torch.int16).numpy()
            difference = np.abs(pixels - reference[f"x_{part}"])
            assert difference.max() <= 1
            assert np.count_nonzero(difference) <= 10


# --- rotmnist, on a miniature archive


def amat(images: np.ndarray, labels: np.ndarray) -> str:
    rows = np.column_stack([images.reshape(len(images), -1), labels])
    return "".join("   " + "   ".join(f"{value:.9g}" for value in row) + "\n" for row in rows)


@pytest.fixture
def archive(monkeypatch):
    """The two files of an archive of 5 + 3 pictures, and the values in them."""
    images = (pictures(8) / np.float32(256)).astype(np.float32)
    labels = np.arange(8)
    train_valid, test = data.ROTMNIST_ROWS
    monkeypatch.setattr(data, "ROTMNIST_ROWS", {train_valid: 5, test: 3})
    monkeypatch.setitem(DATASETS, "rotmnist", DATASETS["rotmnist"]._replace(sizes=(4, 1, 3)))
    return {train_valid: amat(images[:5], labels[:5]), test: amat(images[5:], labels[5:])}, images, labels


def test_an_amat_file_is_read_as_it_stands(tmp_path):
    images, labels = (pictures(3) / np.float32(256)).astype(np.float32), np.array([9, 0, 4])
    path = tmp_path / "a.amat"
    path.write_text(amat(images, labels))
    for given_path in (path, str(path)):
        read, read_labels = load_amat(given_path)
        np.testing.assert_array_equal(read, images)
        np.testing.assert_array_equal(read_labels, labels)
        assert (read.dtype, read_labels.dtype) == (np.float32, np.int64)


LINE = "0.5 " * 784


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("", "0 lines"),
        ("0.5 " * 783 + "3\n", "1 lines of 784 numbers"),
        (f"{LINE}3\n{LINE}\n", "number of columns changed"),
        (f"{LINE}3\n# no comments\n", "number of columns changed"),
        (f"{LINE}3\n{LINE.replace('0.5', 'O.5', 1)}3\n", "could not convert string 'O.5'"),
        (f"{LINE.replace('0.5', '255', 1)}3\n", "pixels from 0.5 to 255"),
        (f"{LINE.replace('0.5', '-0.1', 1)}3\n", "pixels from -0.1 to 0.5"),
        (f"{LINE.replace('0.5', 'nan', 1)}3\n", "pixels from nan"),
        (f"{LINE}10\n", "labels from 10 to 10"),
        (f"{LINE}2.5\n", "labels from 2.5"),
        (f"{LINE}3\n\u00e9\n", "ascii"),
    ],
)
def test_a_malformed_amat_file_is_named_with_what_is_wrong(tmp_path, content, wrong):
    path = tmp_path / "bad.amat"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_amat(path)
    assert str(path) in str(caught.value)
    assert wrong in str(caught.value)


def test_a_missing_amat_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.amat: cannot be read.*No such file"):
        load_amat(tmp_path / "none.amat")


@pytest.mark.parametrize("folder", ["mnist_rotation_new", "rotmnist", "."])
@pytest.mark.parametrize("packed", [False, True], ids=["text", "zip"])
def test_rotmnist_is_found_in_gconv_data(monkeypatch, tmp_path, closed_port, archive, folder, packed):
    files, images, labels = archive
    where = tmp_path / "given" / folder
    where.mkdir(parents=True)
    if packed:
        with zipfile.ZipFile(where / "mnist_rotation_new.zip", "w", zipfile.ZIP_DEFLATED) as packing:
            for file, content in files.items():
                packing.writestr(file, content)
        md5 = hashlib.md5((where / "mnist_rotation_new.zip").read_bytes()).hexdigest()
        monkeypatch.setattr(data, "ROTMNIST_MD5", md5)
    else:
        for file, content in files.items():
            (where / file).write_text(content)
    monkeypatch.setenv("GCONV_DATA", str(tmp_path / "given"))
    rotmnist = load_dataset("rotmnist", progress=False)
    assert [len(s.labels) for s in (rotmnist.train, rotmnist.validation, rotmnist.test)] == [4, 1, 3]
    read = torch.cat([rotmnist.train_and_validation.images, rotmnist.test.images])
    np.testing.assert_array_equal(read[:, 0].numpy(), images)
    assert rotmnist.train_and_validation.labels.tolist() + rotmnist.test.labels.tolist() == labels.tolist()


def test_an_amat_file_with_lines_missing_is_told(monkeypatch, tmp_path, archive):
    files, _, _ = archive
    for file, content in files.items():
        (tmp_path / file).write_text("".join(content.splitlines(keepends=True)[:3]))
    monkeypatch.setenv("GCONV_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"train_valid.amat: 3 lines; the official file has 5"):
        load_dataset("rotmnist")
