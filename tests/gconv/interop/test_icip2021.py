"""Networks of the original separable library give its outputs here (see ../../data/peers)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gconv.interop.icip2021 import convert_state_dict
from gconv.models.networks import Model
from gconv.models.zoo import create_model
from gconv.system.errors import InputError

DATA = Path(__file__).resolve().parents[2] / "data" / "peers" / "sepgrouppy.npz"
RESNET = {"widths": (4, 6, 8), "depth": 8}
NETWORKS = {
    "z2cnn_w9": ("z2cnn", {"width": 9}),
    "p4cnn_w6": ("p4cnn", {"width": 6}),
    "p4cnn_g_w10": ("g-p4cnn", {"width": 10}),
    "p4cnn_gc_w10": ("gc-p4cnn", {"width": 10}),
    "p4m_resnet_111": ("p4m-resnet44", RESNET),
    "g_p4m_resnet_111": ("g-p4m-resnet44", RESNET),
    "gc_p4m_resnet_111": ("gc-p4m-resnet44", RESNET),
}


def stored(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Their state dict, images, and scores in double precision."""
    with np.load(DATA) as file:
        arrays = {key.removeprefix(f"{name}/"): torch.from_numpy(file[key]) for key in file if key.startswith(name)}
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    return state, arrays["x"].double(), arrays["y64"]


def network(name: str) -> Model:
    ours, options = NETWORKS[name]
    return create_model(ours, **options).double().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_their_state_dict_gives_their_scores(name: str) -> None:
    state, images, scores = stored(name)
    net = network(name)
    net.load_state_dict(convert_state_dict(state, net))
    with torch.no_grad():
        found = net(images)
    if "cnn" in name:
        found = F.log_softmax(found, 1)  # with which their CNNs end
    assert ((found - scores).norm() / scores.norm()).item() <= 1e-12


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("p4cnn_w6", {"width": 5}, "conv1.bias has shape [6], for conv1.bias of shape [5]"),
        ("p4cnn_w6", {"separable": "gc"}, "has nothing for conv2.mix"),
        ("p4cnn_gc_w10", {"width": 10, "separable": "g"}, "conv2.depthwise_weight has shape [10, 1, 1, 3, 3]"),
        ("gc_p4m_resnet_111", {**RESNET, "depth": 14}, "has nothing for stage1.1.bn1.bias"),
        ("gc_p4m_resnet_111", {"width": 4, "depth": 8}, "layer2.0.conv1.pointwise_weight has shape [6, 4, 8, 1, 1]"),
    ],
)
def test_a_state_dict_of_another_network_is_refused(name: str, change: dict, message: str) -> None:
    state, _, _ = stored(name)
    net = create_model(NETWORKS[name][0], **change)
    with pytest.raises(InputError) as caught:
        convert_state_dict(state, net)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_the_network_does_not_have_are_named() -> None:
    state, _, _ = stored("p4cnn_w6")
    with pytest.raises(InputError, match=r"has extra\.weight, which the network does not have"):
        convert_state_dict({**state, "extra.weight": torch.zeros(1)}, network("p4cnn_w6"))
