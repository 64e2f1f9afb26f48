"""Writing files: no reader ever sees half a file, and no file of the user is lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A context with a temporary file to write, which replaces ``path`` at its end, or is removed after an error.

    The temporary file is in the folder of ``path``, and missing folders are made. It has the suffix of ``path``,
    because some writers choose the format by the suffix.

    Yields:
        The path of the temporary file.

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
    """Check that ``path`` can be written, before the work whose result it is for; returns it as a ``Path``.

    Args:
        path: the file; folders that do not exist yet will be made.
        force: whether an existing file may be replaced.

    Raises:
        InputError: the file exists and ``force`` is False, or the nearest folder that exists cannot be written to.
    """
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as error:  # the name is too long, or the folder may not be read
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
