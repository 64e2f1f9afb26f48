"""Measure how redundant the filters of a group-convolution network are, and convert it into a separable one.

Names are imported on first use (the list is in ``__init__.pyi``), so that a command line answers before PyTorch loads.
"""

from gconv.system.lazy import attach_public_names

__getattr__, __dir__, __all__ = attach_public_names(__name__, __file__)
