"""Reading files of tensors: both formats of ``torch.save`` and safetensors. Nothing in a file is executed."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

_ACCEPTED = "a checkpoint of gconv.save or gconv.train, or a state dict in .pt, .pth or .safetensors"


def read_plain(path: str | Path) -> Any:
    """The plain data in a file: numbers, text, tensors, and lists and dictionaries of them.

    Files with the suffix ``.safetensors`` are read as such; all others as files of ``torch.save``, in its zip format or
    in the format that it wrote before PyTorch 1.6, with ``weights_only=True``. Only the zip format has checksums, which
    are verified. In the other formats a flipped bit is noticed only if it damages the structure of the file.

    Raises:
        InputError: there is no such file, it is a directory, it is damaged, or it holds anything but plain data. One
            line that names the file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path} is a directory; give a file")
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if path.suffix.lower() == ".safetensors":
            return _read_safetensors(path)
        with path.open("rb") as file:
            is_bare_pickle = file.read(1) == pickle.PROTO
        if is_bare_pickle:
            with warnings.catch_warnings(action="ignore"):  # PyTorch warns of types of storages that it still reads
                return torch.load(path, map_location="cpu", weights_only=True)
        return _read_archive(path)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        what = f"{path} is damaged, or holds objects that are not plain data; nothing in it was executed"
        raise InputError(what) from error
    except zipfile.BadZipFile as error:
        what = f"{path} is damaged or cut off, or it is no file of tensors ({error})"
        raise InputError(f"{what}; accepted: {_ACCEPTED}") from error
    except Exception as error:  # whatever a decoder stumbles over is the file's fault
        what = f"{path} is damaged, or not what its name says ({' '.join(str(error).split())})"
        raise InputError(f"{what}; accepted: {_ACCEPTED}") from error


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Check that no tensor has NaN or infinite entries.

    Args:
        state: tensors by name.
        source: what the error message calls their source.

    Raises:
        InputError: a tensor has such entries. The message names the first one.
    """
    for name, tensor in state.items():
        # PyTorch cannot always say whether floats of 8 bits are finite. No layer computes with them.
        if tensor.is_floating_point() and tensor.itemsize > 1 and not torch.isfinite(tensor).all():
            raise InputError(f"{source} has NaN or infinite entries in {name}; weights must be finite")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_archive(path: Path) -> Any:
    """What a file in the zip format of ``torch.save`` holds, after a check of every entry.

    PyTorch does not verify the checksums in its own files, so that a flipped bit in a weight would go unnoticed. Nor
    does it object to an entry that is marked as a directory: it does not read that entry. ``torch.save`` writes all
    entries uncompressed and without marks.
    """
    with zipfile.ZipFile(path) as archive:
        names = {entry.rpartition("/")[2] for entry in archive.namelist()}
        if "data.pkl" not in names or "constants.pkl" in names:
            kind = "a TorchScript program" if "constants.pkl" in names else "an archive of another kind"
            raise InputError(f"{path} is {kind}; accepted: {_ACCEPTED}")
        marked = (entry.filename for entry in archive.infolist() if entry.compress_type or entry.external_attr)
        damaged = next(marked, None) or archive.testzip()
    if damaged is not None:
        raise InputError(f"{path} is damaged: its entry {damaged} is not as it was written")
    return torch.load(path, map_location="cpu", weights_only=True)
