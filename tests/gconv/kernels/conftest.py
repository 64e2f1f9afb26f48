"""Choosing the version of the compiled kernel that a test runs."""

import pytest

from gconv.kernels import dispatch, library, separable_conv


@pytest.fixture
def only(monkeypatch):
    """Leaves one version of the kernel, for layers of any size, or none; without an argument also no library."""
    variants = dispatch.variants()

    def leave(version=None):
        left = {} if version is None else {version: variants[version]}
        if version is None:
            monkeypatch.setattr(library, "library", lambda: None)
        separable_conv.kernel_of.cache_clear()
        monkeypatch.setattr(dispatch, "variants", lambda: left)
        monkeypatch.setattr(dispatch, "MAX_PLANES", 10**6)

    yield leave
    separable_conv.kernel_of.cache_clear()
