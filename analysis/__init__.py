"""Measure how redundant the filters of a group-convolution network are, and convert it into a separable one.

Names are imported on first use (the list is in ``__init__.pyi``), so that a command line answers before PyTorch loads.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
