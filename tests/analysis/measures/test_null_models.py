"""The nulls: drawn as they say, repeatable, and wide enough for a network that learned nothing."""

import math

import numpy as np
import pytest
import torch

from analysis import block_energies, explained_energy, filter_banks, redundancy
from analysis.filters.banks import FilterBank
from analysis.measures.null_models import NULLS, band, null_filters
from gconv import FORMS, SeparableGConv2d, create_model


def drawn(bank, kind, draws, seed=0):
    return torch.cat(list(null_filters(bank, kind, draws, np.random.default_rng(seed))))


@pytest.fixture
def bank():
    return filter_banks(create_model("p4cnn"))[1]


@pytest.mark.parametrize("kind", NULLS)
def test_the_seed_decides(bank, kind):
    first = drawn(bank, kind, 3)
    assert first.shape == (3, *bank.weight.shape)
    assert first.dtype == torch.float64
    assert torch.equal(first, drawn(bank, kind, 3))
    assert not torch.equal(first, drawn(bank, kind, 3, seed=1))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("kind", NULLS)
def test_batches_are_bounded_and_do_not_change_the_draws(bank, kind):
    rng = np.random.default_rng(0)
    one_by_one = torch.cat([next(null_filters(bank, kind, 1, rng)) for _ in range(5)])
    assert torch.equal(drawn(bank, kind, 5), one_by_one)
    large = FilterBank("large", torch.zeros(256, 128, 4, 1, 1, dtype=torch.float64), bank.group)
    batches = [len(batch) for batch in null_filters(large, kind, 5, rng)]
    assert batches == [2, 2, 1]


def test_init_is_uniform_and_independent(bank):
    entries = drawn(bank, "init", 20).flatten()
    scaled = entries / entries.abs().max()
    counts = torch.histc(scaled, 10, -1, 1) / len(scaled)
    np.testing.assert_allclose(counts, 0.1, atol=5 * (0.09 / len(scaled)) ** 0.5)
    neighbours = (scaled[1:] * scaled[:-1]).mean().item() * 3
    assert abs(neighbours) < 5 / len(scaled) ** 0.5


def test_shuffled_keeps_the_entries_and_nothing_else(bank):
    for one in drawn(bank, "shuffled", 3):
        assert torch.equal(one.flatten().sort().values, bank.weight.flatten().sort().values)
        assert not torch.equal(one, bank.weight)


@pytest.mark.parametrize("form", FORMS)
def test_init_of_a_separable_layer_has_its_rank_and_the_distribution_of_new_layers(form):
    def layer():
        return SeparableGConv2d(6, 5, 3, group="p4", form=form, rank=2)

    (bank,) = filter_banks(layer())
    for one in drawn(bank, "init", 3):
        kept = explained_energy(block_energies(one, form, bank.group))
        assert kept[1].item() == pytest.approx(1, abs=1e-12)
        assert kept[0].item() < 0.99
    new = torch.stack([layer().weight.detach() for _ in range(200)])
    for other in FORMS:
        here, there = (
            explained_energy(block_energies(weights, other, bank.group))[:, 0]
            for weights in (drawn(bank, "init", 200), new)
        )
        error = ((here.var() + there.var()) / 200).sqrt()
        assert abs(here.mean() - there.mean()) < 5 * error + 1e-9


def test_a_network_that_learned_nothing_lies_in_its_bands():
    frame = redundancy(create_model("p4cnn", width=6), draws=40).to_frame()
    for kind in NULLS:
        z = frame[f"{kind}_z"].dropna()
        assert len(z) > 500
        assert z.abs().max() < 8  # a 40-draw t statistic; trained ones are at 20 to 100
        assert (z.abs() < 1.96).mean() > 0.85


def test_band_is_the_prediction_interval_of_a_normal_draw():
    draws = np.random.default_rng(0).normal(3, 2, (20, 2))
    found = band(torch.tensor([9.0, 3]), torch.tensor(draws))
    mean, sd = draws.mean(0), draws.std(0, ddof=1)
    np.testing.assert_allclose(found.mean, mean)
    width = 2.093 * math.sqrt(1.05) * sd  # Student's t with 19 degrees of freedom, from a printed table
    np.testing.assert_allclose(found.low, mean - width, atol=1e-3)
    np.testing.assert_allclose(found.high, mean + width, atol=1e-3)
    np.testing.assert_allclose(found.z, (np.array([9.0, 3]) - mean) / sd)


@pytest.mark.parametrize("draws", [2, 5, 20])
def test_the_band_holds_95_percent_of_further_draws(draws):
    rng = np.random.default_rng(draws)
    found = band(torch.tensor(rng.normal(size=20_000)), torch.tensor(rng.normal(size=(draws, 20_000))))
    further = torch.tensor(rng.normal(size=20_000))
    assert ((found.low < further) & (further < found.high)).double().mean() == pytest.approx(0.95, abs=0.01)


def test_where_a_null_does_not_vary_there_is_no_z():
    drawn = 1 + torch.tensor([[1e-16], [0], [-1e-16]], dtype=torch.float64)
    found = band(torch.tensor([0.5], dtype=torch.float64), drawn)
    assert found.mean.item() == pytest.approx(1)
    assert found.z.isnan().all()
