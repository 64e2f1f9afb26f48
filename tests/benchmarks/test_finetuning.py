"""The table and the figure of fine-tuning say what the records say."""

import matplotlib.pyplot as plt
import pytest

from analysis.fitting.distillation import Distillation, finetuning_recipe
from benchmarks import finetuning
from benchmarks.finetuning import RUNS, WAYS, Run


def document(run, number):
    """A record as ``record`` makes it, its figures told apart by its number."""
    return {
        "run": vars(run),
        "original": {"validation_error": 2.5},
        "converted": {"validation_error": 7.0 + number, "divergence": 1.0},
        "finetuned": {"validation_error": 3.0 + number, "divergence": 0.05 + number},
        "history": [{"train_error": 9.0}, {"train_error": 1.0 + number}],
    }


@pytest.fixture
def records(monkeypatch):
    """More epochs before fewer, and another way and another seed between them."""
    runs = [Run(0, epochs=20), Run(1, "averaged"), Run(0), Run(1)]
    documents = [document(run, number) for number, run in enumerate(runs)]
    monkeypatch.setattr(finetuning, "load_records", lambda: documents)
    return documents


def test_a_line_for_every_run_in_order(records):
    _, _, *lines = finetuning.table().splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["default", "10", "0", "2.50 %", "9.00 %", "5.00 %", "2.0500", "3.00 %"],
        ["default", "10", "1", "2.50 %", "10.00 %", "6.00 %", "3.0500", "4.00 %"],
        ["default", "20", "0", "2.50 %", "7.00 %", "3.00 %", "0.0500", "1.00 %"],
        ["averaged", "10", "1", "2.50 %", "8.00 %", "4.00 %", "1.0500", "2.00 %"],
    ]


def test_the_curve_is_of_one_seed_and_the_default(records):
    plt.switch_backend("agg")
    figure = finetuning.plot()
    try:
        curves = [axis.get_lines()[0].get_xydata().tolist() for axis in figure.axes]
        assert curves == [[[10, 5.0], [20, 3.0]], [[10, 2.05], [20, 0.05]]]
        assert set(figure.axes[0].get_lines()[1].get_ydata()) == {2.5}
    finally:
        plt.close(figure)


def test_runs_have_records_of_their_own_and_ways_are_of_the_recipe():
    assert len({run.path for run in RUNS}) == len(set(RUNS)) == len(RUNS)
    for changes, distilling in WAYS.values():
        recipe = finetuning_recipe(10, 1000).to_dict()
        assert set(changes) <= {*recipe, "averaging"}
        Distillation(**distilling)
