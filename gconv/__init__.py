"""Group-equivariant convolutions, full and separable: layers, models, data, training.

Names are imported on first use (the list is in ``__init__.pyi``), so that a command line answers before PyTorch loads.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
