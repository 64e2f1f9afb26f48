"""The measures against exact cases, against their definitions, and against NumPy, scikit-learn and tensorly."""

import numpy as np
import pandas as pd
import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.decomposition import PCA
from tensorly.decomposition import tucker

from analysis import block_redundancy
from analysis.filters.banks import FilterBank
from analysis.measures import spectra
from analysis.measures.measures import MEASURED_FORMS, group_gram, invariance, irrep_energy, kernel_cosine, pool, values
from analysis.measures.measures import spectra as measured
from gconv import GROUPS, SeparableGConv2d, act, group
from gconv.groups.irreps import irreps

GROUPS_WITH_AXIS = [group(name) for name in GROUPS if name != "z2"]
every_group = pytest.mark.parametrize("under", GROUPS_WITH_AXIS, ids=str)
every_form = pytest.mark.parametrize("form", MEASURED_FORMS)


def random_filter(o, i, under, k, *, seed=0, s=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(o, i, s or under.order, k, k, dtype=torch.float64, generator=generator)


def measure(weight, under, **kwargs):
    """One filter's measures as plain lists."""
    return {key: value[0].tolist() for key, value in values(measured(weight.unsqueeze(0), under, **kwargs)).items()}


def input_frame(weight, under):
    """K[o, i, s, s y]: every kernel transformed back by its element, with the action on planar maps."""
    return torch.stack([act(under, int(under.inverse[s]), weight[:, :, s]) for s in range(under.order)], dim=2)


def blocks(weight, under, form):
    """The matrices of a form, cut out one by one."""
    o, i, s, k, _ = weight.shape
    if form == "g":
        return [weight[a, b].reshape(s, k * k).numpy() for a in range(o) for b in range(i)]
    if form == "gc":
        return [weight[a].reshape(i * s, k * k).numpy() for a in range(o)]
    turned = input_frame(weight, under)
    return [turned[:, b].reshape(o * s, k * k).numpy() for b in range(i)]


# ---------------------------------------------------------------------------------------------------- exact cases


@every_form
@every_group
@pytest.mark.parametrize("rank", [1, 2])
def test_a_filter_built_with_rank_r_is_found_to_have_rank_r_and_no_less(under, form, rank):
    layer = SeparableGConv2d(4, 3, 3, group=under, form=form, rank=rank, dtype=torch.float64)
    found = measure(layer.weight.detach(), under)
    kept = found["explained_energy", form]
    assert kept[rank - 1] == pytest.approx(1, abs=1e-12)
    assert all(share < 1 - 1e-4 for share in kept[: rank - 1])
    assert found["effective_rank", form][0] <= rank + 1e-9
    assert found["stable_rank", form][0] <= rank + 1e-12
    assert found["rank_99", form][0] <= rank


@every_group
@pytest.mark.parametrize("turned", [False, True])
def test_an_invariant_filter_has_all_its_energy_in_the_trivial_irrep(under, turned):
    kernel = random_filter(3, 2, under, 3, s=1)
    copies = kernel.expand(-1, -1, under.order, -1, -1)
    if turned:  # K[o, i, s, y] = d[o, i, s^-1 y], which the group's own action leaves as it is
        copies = torch.stack([act(under, s, kernel[:, :, 0]) for s in range(under.order)], dim=2)
        for h in range(under.order):
            torch.testing.assert_close(act(under, h, copies), copies, rtol=0, atol=0)
    frame = "_turned" if turned else ""
    found = measure(copies, under)
    trivial, *others = irreps(under)
    assert found[f"irrep_energy{frame}", trivial.name][0] == pytest.approx(1, abs=1e-12)
    assert all(abs(found[f"irrep_energy{frame}", irrep.name][0]) < 1e-12 for irrep in others)
    assert found[f"cosine{frame}", "mean"][0] == pytest.approx(1, abs=1e-12)
    for name in ("average", *under.element_names[1:]):
        assert found[f"invariance{frame}", name][0] == pytest.approx(1, abs=1e-12)
    if not turned and under.order > 2:
        assert found["explained_energy", "g"][0] == pytest.approx(1, abs=1e-12)
        assert found["pca_explained_variance", "g"][0] == 1  # no variance at all: rounding is not taken for some


@every_group
@pytest.mark.parametrize("turned", [False, True])
def test_a_filter_in_one_irrep_has_its_energy_there(under, turned):
    weight = random_filter(3, 2, under, 3)
    for number, irrep in enumerate(irreps(under)):
        inside = torch.einsum("st,oitxy->oisxy", torch.tensor(irrep.projector), weight)
        if turned:
            inside = torch.stack([act(under, s, inside[:, :, s]) for s in range(under.order)], dim=2)
        shares = irrep_energy(group_gram(inside, under, turned=turned).sum((0, 1)), under)
        expected = torch.zeros(len(irreps(under)), dtype=torch.float64)
        expected[number] = 1
        torch.testing.assert_close(shares, expected, rtol=0, atol=1e-12)


@every_group
@pytest.mark.parametrize("turned", [False, True])
def test_a_random_filter_spreads_its_energy_by_the_dimensions_squared_over_the_order(under, turned):
    weight = random_filter(60, 50, under, 3)
    shares = irrep_energy(group_gram(weight, under, turned=turned).sum((0, 1)), under)
    # 3000 filters of 9 pixels: a share of p varies by about sqrt(2 p / 27000).
    np.testing.assert_allclose(shares, [irrep.share for irrep in irreps(under)], atol=5 * (2 / 27000) ** 0.5)


@given(
    under=st.sampled_from(GROUPS_WITH_AXIS),
    o=st.integers(1, 3),
    i=st.integers(1, 3),
    k=st.integers(1, 4),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 10**6),
)
def test_shares_sum_to_one_whatever_the_filter(under, o, i, k, scale, seed):
    found = measured(scale * random_filter(o, i, under, k, seed=seed).unsqueeze(0), under)
    for frame in ("", "_turned"):
        total = sum(value.item() for (name, _), value in found.items() if name == f"irrep_energy{frame}")
        assert total == pytest.approx(1, abs=1e-12)
        average = found[f"invariance{frame}", "average"].item()
        assert average == pytest.approx(found[f"irrep_energy{frame}", irreps(under)[0].name].item(), abs=1e-12)
    for (name, part), value in values(found).items():
        assert torch.isfinite(value).all(), (name, part)
        if name in ("explained_energy", "pca_explained_variance", "hosvd_energy"):
            assert (value.diff() >= -1e-12).all()
            assert value[0, -1].item() == pytest.approx(1, abs=1e-12)


# ------------------------------------------------------------------------------------------------------ definitions


@every_group
def test_invariance_is_the_cosine_with_the_moved_filter(under):
    weight = random_filter(3, 2, under, 3)
    energy = weight.square().sum().item()
    kept = invariance(group_gram(weight, under, turned=True).sum((0, 1)), under)
    along_axis = invariance(group_gram(weight, under).sum((0, 1)), under)
    for h in range(under.order):
        assert kept[h].item() == pytest.approx((act(under, h, weight) * weight).sum().item() / energy, abs=1e-12)
        moved = weight[:, :, [int(under.product[under.inverse[h], s]) for s in range(under.order)]]
        assert along_axis[h].item() == pytest.approx((moved * weight).sum().item() / energy, abs=1e-12)


@every_group
def test_the_trivial_share_is_that_of_the_group_average(under):
    weight = random_filter(3, 2, under, 3)
    average = weight.mean(2, keepdim=True).expand_as(weight)
    share = irrep_energy(group_gram(weight, under), under)[..., 0]
    expected = average.square().sum((2, 3, 4)) / weight.square().sum((2, 3, 4))
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-12)


@every_group
@pytest.mark.parametrize("turned", [False, True])
def test_cosine_is_the_mean_over_pairs_without_kernels_of_zeros(under, turned):
    weight = random_filter(2, 2, under, 3)
    weight[0, 0, 1] = 0
    kernels = (input_frame(weight, under) if turned else weight).flatten(3).numpy()
    found = kernel_cosine(group_gram(weight, under, turned=turned))
    for a in range(2):
        for b in range(2):
            pairs = [(s, t) for s in range(under.order) for t in range(under.order) if s != t]
            norms = np.linalg.norm(kernels[a, b], axis=1)
            cosines = [
                kernels[a, b, s] @ kernels[a, b, t] / norms[s] / norms[t] for s, t in pairs if norms[s] * norms[t]
            ]
            expected = np.mean(cosines) if cosines else np.nan
            np.testing.assert_allclose(found[a, b], expected, atol=1e-12)


def test_ranks_are_read_off_the_spectrum():
    shares = torch.tensor([[0.5, 0.4, 0.06, 0.04], [1, 0, 0, 0], [0.25] * 4], dtype=torch.float64)
    torch.testing.assert_close(spectra.stable_rank(shares), torch.tensor([2.0, 1, 4], dtype=torch.float64))
    np.testing.assert_allclose(spectra.effective_rank(shares), np.exp(entropy(shares, axis=1)), rtol=1e-12)
    assert [spectra.rank_needed(shares, target).tolist() for target in (0.90, 0.95, 0.99)] == [
        [2, 1, 4],
        [3, 1, 4],
        [4, 1, 4],
    ]


def test_batched_filters_are_measured_as_each_alone():
    under = group("p4m")
    weights = torch.stack([random_filter(3, 2, under, 3, seed=seed) for seed in range(4)])
    together = values(measured(weights, under))
    for number, weight in enumerate(weights):
        for key, value in measure(weight, under).items():
            np.testing.assert_allclose(together[key][number], value, rtol=0, atol=1e-12)
    nested = spectra.block_energies(weights.unflatten(0, (2, 2)), "gc_in", under)
    torch.testing.assert_close(nested.flatten(0, 1), spectra.block_energies(weights, "gc_in", under))


def test_pooling_is_that_of_the_energy_of_layers_scaled_alike():
    under = group("p4")
    first, second = random_filter(3, 2, under, 3), 100 * random_filter(2, 4, under, 4, seed=1)
    layers = [measured(weight.unsqueeze(0), under) for weight in (first, second)]
    pooled = values(pool(layers, [first.numel(), second.numel()]))
    scaled = [weight / weight.square().mean().sqrt() for weight in (first, second)]
    for form in MEASURED_FORMS:
        energies = [spectra.block_energies(weight, form, under).sum(0) for weight in scaled]
        longest = max(map(len, energies))
        total = sum(torch.nn.functional.pad(energy, (0, longest - len(energy))) for energy in energies)
        expected = total.cumsum(0) / total.sum()
        torch.testing.assert_close(pooled["explained_energy", form][0], expected, rtol=0, atol=1e-12)
    gram = sum(group_gram(weight, under).sum((0, 1)) for weight in scaled)
    for irrep, share in zip(irreps(under), irrep_energy(gram, under), strict=True):
        assert pooled["irrep_energy", irrep.name].item() == pytest.approx(share.item(), abs=1e-12)


# ------------------------------------------------------------------------------------- independent implementations


@every_form
@every_group
@pytest.mark.parametrize("k", [2, 3])
def test_explained_energy_is_that_of_numpys_svd_block_by_block(under, form, k):
    weight = random_filter(3, 4, under, k)
    spectrum = [np.linalg.svd(block, compute_uv=False) ** 2 for block in blocks(weight, under, form)]
    table = block_redundancy(FilterBank("layer", weight, under))
    alone = table[(table.measure == "explained_energy") & (table.part == form)].pivot(
        index="block", columns="rank", values="value"
    )
    shares = np.array(spectrum) / np.sum(spectrum, axis=1, keepdims=True)
    np.testing.assert_allclose(alone, shares.cumsum(1), rtol=0, atol=1e-12)
    pooled = np.sum(spectrum, axis=0)
    np.testing.assert_allclose(
        measure(weight, under)["explained_energy", form], pooled.cumsum() / pooled.sum(), rtol=0, atol=1e-12
    )


@every_form
@pytest.mark.parametrize("under", [group("p4"), group("pmm"), group("p4m")], ids=str)
def test_pca_is_that_of_scikit_learn(under, form):
    weight = random_filter(3, 4, under, 3) + 0.5  # a mean that matters
    fitted = [PCA().fit(block) for block in blocks(weight, under, form)]
    components = min(under.order - 1 if form == "g" else 9, 9)
    table = block_redundancy(FilterBank("layer", weight, under))
    alone = table[(table.measure == "pca_explained_variance") & (table.part == form)]
    for number, pca in enumerate(fitted):
        found = alone[alone.block == number].value
        np.testing.assert_allclose(found, pca.explained_variance_ratio_[:components].cumsum(), rtol=0, atol=1e-12)
    variances = np.sum([pca.explained_variance_[:components] for pca in fitted], axis=0)
    np.testing.assert_allclose(
        measure(weight, under)["pca_explained_variance", form], variances.cumsum() / variances.sum(), rtol=0, atol=1e-12
    )
    energies = spectra.block_variances(weight, form, under) / (len(blocks(weight, under, form)[0]) - 1)
    np.testing.assert_allclose(energies.sum(0), variances, rtol=1e-12)


@pytest.mark.parametrize("under", [group("p2"), group("p4m")], ids=str)
def test_multilinear_spectra_are_those_of_tensorlys_hosvd(under):
    weight = random_filter(5, 4, under, 3)
    tensor = tensorly.tensor(weight.flatten(3).numpy())
    core, _ = tucker(tensor, rank=list(tensor.shape), init="svd", n_iter_max=1)
    found = measure(weight, under)
    for axis, along in enumerate(("out", "in", "group", "space")):
        others = tuple(other for other in range(4) if other != axis)
        energies = np.square(core).sum(others)
        np.testing.assert_allclose(found["hosvd_energy", along], energies.cumsum() / energies.sum(), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- degenerate


def test_a_layer_of_zeros_is_of_rank_one_and_undefined_along_the_group():
    found = measure(torch.zeros(3, 2, 4, 3, 3), group("p4"))
    for (name, part), value in found.items():
        if name in ("explained_energy", "pca_explained_variance", "hosvd_energy"):
            assert value == [1] * len(value), (name, part)
        elif name.startswith(("cosine", "invariance", "irrep")):
            assert np.isnan(value[0]), (name, part)
        else:
            assert value == [1], (name, part)


@pytest.mark.parametrize(
    ("shape", "on", "forms", "pca", "unfoldings", "axis"),
    [
        pytest.param((3, 2, 4, 3, 3), "p4", ["g", "gc", "gc_in"], ["g", "gc", "gc_in"], 4, True, id="full"),
        pytest.param((3, 2, 2, 3, 3), "pm", ["g", "gc", "gc_in"], ["gc", "gc_in"], 4, True, id="two elements"),
        pytest.param((1, 1, 4, 3, 3), "p4", ["g", "gc", "gc_in"], ["g", "gc", "gc_in"], 2, True, id="one channel"),
        pytest.param((3, 2, 4, 1, 1), "p4", [], [], 3, True, id="1x1"),
        pytest.param((3, 2, 1, 3, 3), "p4", [], [], 3, False, id="lifting"),
        pytest.param((4, 1, 1, 3, 3), "p4", [], [], 2, False, id="lifting one channel"),
        pytest.param((3, 2, 1, 3, 3), "z2", ["gc", "gc_in"], ["gc_in"], 3, False, id="planar"),
        pytest.param((3, 2, 1, 1, 1), "z2", [], [], 2, False, id="planar 1x1"),
        pytest.param((1, 1, 1, 1, 1), "z2", [], [], 1, False, id="one number"),
        pytest.param((1, 1, 1, 3, 3), "z2", [], [], 1, False, id="one kernel"),
    ],
)
def test_what_cannot_tell_anything_is_left_out(shape, on, forms, pca, unfoldings, axis):
    weight = torch.randn(shape, dtype=torch.float64)
    found = measure(weight, group(on))
    assert [part for name, part in found if name == "explained_energy"] == forms
    assert [part for name, part in found if name == "pca_explained_variance"] == pca
    assert len([part for name, part in found if name == "hosvd_energy"]) == unfoldings
    assert any(name == "irrep_energy" for name, _ in found) == axis
    assert all(np.isfinite(value).all() for value in found.values())
    assert isinstance(block_redundancy(FilterBank("layer", weight, group(on))), pd.DataFrame)


def test_grouped_convolutions_have_nothing_over_the_filters_of_one_input_channel():
    found = measure(torch.randn(6, 2, 1, 3, 3), group("z2"), shared_inputs=False)
    assert {part for name, part in found if name in ("explained_energy", "hosvd_energy")} == {"gc", "out", "space"}
