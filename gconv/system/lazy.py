"""Packages whose public names are imported on first use, so that ``import gconv`` does not wait for PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import lazy_loader


class _LazyPackage(ModuleType):
    """A package in which a public name never becomes the submodule of the same name.

    Python binds a submodule to its package as soon as anything imports it. After ``import gconv.export``, the name
    ``gconv.export`` would be the module and no longer the function. Not every version of lazy_loader prevents this.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in vars(self)["__all__"] and value is sys.modules.get(f"{self.__name__}.{name}")):
            super().__setattr__(name, value)


def attach_public_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make a package import each public name on first use; its stub lists them (``from .room.module import name``).

    A submodule may have the name of a public function, as the command ``gconv.export`` has. The attribute of the
    package is then always the function, in whatever order the two are imported. ``from gconv.export import …``,
    ``importlib.import_module("gconv.export")`` and ``python -m gconv.export`` give the submodule.

    Args:
        package: ``__name__`` of the package.
        file: ``__file__`` of the package; the stub is beside it.

    Returns:
        The package's ``__getattr__``, ``__dir__`` and ``__all__``.
    """
    module = sys.modules[package]
    find, names, public = lazy_loader.attach_stub(package, file)
    for name in public:
        if isinstance(vars(module).get(name), ModuleType):  # bound by EAGER_IMPORT, a switch of lazy_loader
            delattr(module, name)
    vars(module)["__all__"] = public
    module.__class__ = _LazyPackage
    return find, names, public
