"""Explained energy against NumPy's SVD of blocks that are cut out of the filter one by one."""

import numpy as np
import pytest
import torch

from analysis.measures.spectra import block_energies, explained_energy
from gconv import FORMS, GROUPS, SeparableGConv2d, act, group

every_form = pytest.mark.parametrize("form", FORMS)
every_filter = pytest.mark.parametrize(
    ("under", "k"), [(group(name), k) for name in GROUPS[1:] for k in (1, 2, 3)] + [(group("p4m"), 4)], ids=str
)


def blocks_by_hand(weight, form, under):
    """The matrices of a form, from its definition; in the frame of its input element a kernel is transformed back."""
    weight = weight.double()
    o, i, s, k, _ = weight.shape
    if form not in ("g", "gc"):
        weight = torch.stack([act(under, int(under.inverse[t]), weight[:, :, t]) for t in range(s)], dim=2)
    if form in ("g", "g_turned"):
        return [weight[a, b].reshape(s, k * k).numpy() for a in range(o) for b in range(i)]
    if form in ("gc", "gc_turned"):
        return [weight[a].reshape(i * s, k * k).numpy() for a in range(o)]
    return [weight[:, b].reshape(o * s, k * k).numpy() for b in range(i)]


@every_form
@every_filter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_energies_are_the_squared_singular_values_of_the_blocks(form, under, k, dtype):
    weight = torch.randn(3, 2, under.order, k, k, dtype=dtype)
    energies = block_energies(weight, form, under)
    expected = [np.linalg.svd(matrix, compute_uv=False) ** 2 for matrix in blocks_by_hand(weight, form, under)]
    assert energies.dtype == torch.float64
    assert (energies >= 0).all()
    np.testing.assert_allclose(energies, expected, rtol=0, atol=1e-12 * np.sum(expected))


@every_form
@every_filter
def test_explained_energy_is_one_minus_the_squared_error_of_the_truncated_svd(form, under, k):
    weight = torch.randn(2, 3, under.order, k, k, dtype=torch.float64)
    matrices = blocks_by_hand(weight, form, under)
    expected = []
    for rank in range(1, min(matrices[0].shape) + 1):
        lost = 0.0
        for matrix in matrices:
            u, s, vh = np.linalg.svd(matrix, full_matrices=False)
            lost += np.linalg.norm(matrix - (u[:, :rank] * s[:rank]) @ vh[:rank]) ** 2
        expected.append(1 - lost / weight.square().sum().item())
    kept = explained_energy(block_energies(weight, form, under))
    np.testing.assert_allclose(kept, expected, rtol=0, atol=1e-12)
    assert kept[-1].item() == pytest.approx(1, abs=1e-12)


@every_form
def test_a_filter_of_rank_two_is_explained_at_rank_two(form):
    layer = SeparableGConv2d(3, 2, 3, group="p4m", form=form, rank=2, dtype=torch.float64)
    kept = explained_energy(block_energies(layer.weight.detach(), form, layer.group))
    assert kept[0] < 0.99
    np.testing.assert_allclose(kept[1:], 1, rtol=0, atol=1e-12)


@every_form
def test_zeros_are_fully_explained(form):
    kept = explained_energy(block_energies(torch.zeros(2, 2, 4, 3, 3), form, group("p4")))
    assert kept.tolist() == [1] * (4 if form in ("g", "g_turned") else 8)


def test_energy_is_pooled_over_the_blocks_and_not_averaged():
    strong, weak, empty = [8.0, 0.0], [1.0, 1.0], [0.0, 0.0]
    kept = explained_energy(torch.tensor([strong, weak, empty], dtype=torch.float64))
    assert kept.tolist() == pytest.approx([9 / 10, 1])  # the mean of the blocks' shares would be 3/4 or 5/6
