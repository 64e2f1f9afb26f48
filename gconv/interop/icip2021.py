"""State dicts of the networks of the ICIP 2021 code (Lengyel & van Gemert), the separable library for GrouPy.

Its CNNs have the names of ours. Its ResNets have those of torchvision. Its separable layers hold two factors of rank
one, whose product is the full filter: ``pointwise_weight [O, I, S, 1, 1]``, and ``depthwise_weight``, which is
``[O, I, k, k]`` for the form g and ``[O, 1, 1, k, k]`` for gc. Ours hold the same numbers as ``mix`` and ``spatial``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from gconv.models.networks import Model, ResNet
from gconv.system.errors import InputError

_FACTORS = ((r"\.pointwise_weight$", ".mix"), (r"\.depthwise_weight$", ".spatial"))
_RESNET = (
    (r"^conv1\.", "stem."),
    (r"^bn1\.", "bn."),
    (r"^layer(\d)\.", r"stage\1."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut_bn."),
)


def convert_state_dict(state: Mapping[str, Tensor], net: Model) -> dict[str, Tensor]:
    """A state dict of the ICIP 2021 code with the names and shapes of a network of this package.

    Args:
        state: tensors by the names of that code.
        net: the network that is to have them, of the same architecture, widths, depth and form. It is not changed; give
            the result to its ``load_state_dict``.

    Raises:
        InputError: the names or the sizes are not those of such a network.
    """
    wanted = net.state_dict()
    renamed = {_renamed(name, isinstance(net, ResNet)): (name, tensor) for name, tensor in state.items()}
    missing = sorted(wanted.keys() - renamed.keys())
    unknown = sorted(renamed[name][0] for name in renamed.keys() - wanted.keys())
    if missing or unknown:
        what = f"nothing for {missing[0]}" if missing else f"{unknown[0]}, which the network does not have"
        raise InputError(f"the state dict has {what}. Give that of {net.spec} with the same depth and form.")
    converted = {}
    for name, like in wanted.items():
        theirs, tensor = renamed[name]
        # The axes are in the same order. The factors differ from ours in axes of length one.
        if [n for n in tensor.shape if n > 1] != [n for n in like.shape if n > 1]:
            given, ours = list(tensor.shape), list(like.shape)
            raise InputError(f"{theirs} has shape {given}, for {name} of shape {ours}. Give the same widths and form.")
        converted[name] = tensor.detach().reshape(like.shape)
    return converted


def _renamed(name: str, resnet: bool) -> str:
    for pattern, ours in (*(_RESNET if resnet else ()), *_FACTORS):
        name = re.sub(pattern, ours, name)
    return name
