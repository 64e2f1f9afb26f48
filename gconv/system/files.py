"""Writing files so that a reader never sees half of one, and nothing of the user's is lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends, or vanishes if it fails.

    The temporary file keeps the suffix, as some writers choose the format by it. Missing parent folders are made.

    Raises:
        InputError: the folder cannot be made or written to, or ``path`` is a folder.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: str | Path, *, force: bool) -> Path:
    """``path``, if it may be written: nothing is there, or the user said that it may be replaced.

    Raises:
        InputError: something is there and ``force`` is False, or the nearest existing folder cannot be written to.
    """
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long, or a folder that may not be looked into
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    if exists and not force:
        raise InputError(f"{path} exists; choose another output or replace it with --force")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"cannot write {path}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: the directory {parent} is not writable")
    return path
