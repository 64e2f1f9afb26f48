"""Group-equivariant convolutions, full and separable: layers, models, data, training.

Names are imported on first use (the list is in ``__init__.pyi``), so that a command line answers before PyTorch loads.
"""

from gconv.system.lazy import attach_public_names

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = attach_public_names(__name__, __file__)
