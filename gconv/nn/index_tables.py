"""The index tables of a layer, which have the right values on the right device however the layer gets there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from gconv.functional.expansion import Tables
from gconv.groups.point_groups import Group


class IndexedModule(nn.Module):
    """A module with the index tables of a group and a kernel size as non-persistent buffers.

    The tables follow the module to its device, and no state dict has them.
    """

    group: Group
    kernel_size: tuple[int, int]
    _lifting = False
    _expansion: Tensor
    _relative: Tensor
    _pixels: Tensor

    def _add_tables(self, device: torch.device | str | None) -> None:
        for name, table in self._new_tables(device)._asdict().items():
            self.register_buffer(f"_{name}", table, persistent=False)

    def _forget(self) -> None:
        """Drop what was computed with former tables."""

    @property
    def tables(self) -> Tables:
        """The index tables of this layer's group and kernel size, on the device of its parameters."""
        return self._tables_at(next(self.parameters()).device)

    def _tables_at(self, device: torch.device) -> Tables:
        # A layer on the meta device may run with parameters of another one, put in place by functional_call.
        here = self._pixels.device == device
        return Tables(self._expansion, self._relative, self._pixels) if here else self._new_tables(device)

    def _new_tables(self, device: torch.device | str | None) -> Tables:
        return Tables.build(self.group, self.kernel_size[0], lifting=self._lifting, device=device)

    def _fill_tables(self, device: torch.device) -> None:
        self._forget()
        for name, table in self._new_tables(device)._asdict().items():
            setattr(self, f"_{name}", table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move of a module, be it to a device, a type or a memory format."""

        def moved(tensor: Tensor) -> Tensor:
            try:
                return fn(tensor)
            except RuntimeError:
                # channels_last, which is for maps of 4 axes. Factors and generators of 5 axes keep their order.
                if tensor.dim() != 5:
                    raise
                return fn(tensor.flatten(1)).view(tensor.shape)

        before = self._pixels
        super()._apply(moved, recurse)
        if self._pixels is not before:  # to_empty() gives memory without values
            self._fill_tables(self._pixels.device)
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        # A layer on the meta device gets parameters of another device with assign=True. No state dict has the tables.
        for parameter in self.parameters(recurse=False):
            if parameter.device != self._pixels.device:
                self._fill_tables(parameter.device)
