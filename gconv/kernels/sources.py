"""The C sources of the kernels, and how a build is known to be theirs.

``setup.py`` runs this file by itself, so it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent / "csrc"


def sources(folder: Path = FOLDER) -> list[Path]:
    """All files that the library is built from, in a fixed order; none where only the library was installed."""
    return sorted(path for path in folder.glob("*") if path.suffix in (".c", ".h"))


def digest(folder: Path = FOLDER) -> str:
    """A digest of their names and contents. The library has that of the sources that it was built from."""
    found = hashlib.sha256()
    for path in sources(folder):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
