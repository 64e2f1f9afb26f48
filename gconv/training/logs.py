"""Where the history of a training run is written, besides its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gconv.system.errors import InputError
from gconv.system.files import atomic_path

History = list[dict[str, Any]]
"""One row of plain data per epoch."""

Log = Callable[[History], None]
"""Called after every epoch with the whole history."""


def history_file(path: str | Path) -> Log:
    """A log that writes the whole history to a file, one JSON object per line."""

    def write(history: History) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in history), encoding="utf-8")

    return write


def tensorboard(folder: str) -> Log:
    """A log that adds the last epoch of the history to the events of TensorBoard in a folder.

    Raises:
        InputError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs a package: pip install tensorboard") from error
    writers: list[Any] = []

    def write(history: History) -> None:
        row = history[-1]
        if not writers:  # drops what a killed run logged after its last checkpoint
            writers.append(SummaryWriter(folder, purge_step=row["epoch"]))
        for key, value in row.items():
            if key != "epoch":
                writers[0].add_scalar(key, value, row["epoch"])
        writers[0].flush()

    return write
