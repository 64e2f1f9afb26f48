"""Two processes train the network of one with the whole batch.

The runs are done by this file as a program, in two processes as ``torchrun`` starts them, and once by ``torchrun``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gconv import create_model
from gconv.models import checkpoint
from gconv.nn import batchnorm as norm
from gconv.system.distributed import joined, processes, rank, sum_over_processes
from gconv.system.errors import InputError
from gconv.training import steps
from gconv.training.datasets import Split
from gconv.training.evaluation import evaluate
from gconv.training.loop import fit
from gconv.training.recipe import Recipe

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="PyTorch was built without gloo"
)

DOUBLE, SINGLE = torch.float64, torch.float32
RECIPE = {"epochs": 2, "batch_size": 6, "learning_rate": 3e-3}  # of 15 images: the last batch has 3
# Where a gradient is zero but for rounding, as of biases before batch norm, Adam makes a step of its sign.
RECIPE["weight_decay"] = 0.1
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "single": {"dtype": SINGLE},
    "turned": {"recipe": {"augmentation": "rotation", "label_smoothing": 0.1}},
    "averaged": {"recipe": {"averaging": 0.9, "schedule": "cosine", "augmentation": "affine"}},
    "penalised": {"recipe": {"low_rank_penalty": 0.5}},
    "separable": {"model": "gc-p4cnn"},
    "planar": {"model": "z2cnn"},
    "odd": {"recipe": {"batch_size": 5}},
    "whole": {"recipe": {"batch_size": 15}},
    "half": {"dtype": SINGLE, "precision": "bfloat16"},
}
TOLERANCE = {"single": 1e-4, "half": 0.2}
# In single precision rounding decides some of the first steps of Adam, each of the size of the rate.
WEIGHTS = TOLERANCE | {"single": RECIPE["learning_rate"]}


def pictures(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    return Split(torch.rand(count, 1, 28, 28, generator=generator) * (labels.view(-1, 1, 1, 1) + 1) / 10, labels)


def trained(case: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """History and weights of a case, in this process or with the others."""
    torch.manual_seed(0)
    model = create_model(case.get("model", "p4cnn"), width=2).to(case.get("dtype", DOUBLE))
    recipe = Recipe(**{**RECIPE, **case.get("recipe", {})})
    options = {"precision": case.get("precision", "float32"), "label": None}
    history = fit(model, pictures(15, 0), recipe, seed=1, validation=pictures(7, 1), **options)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history], model.state_dict()


def refused(**options: Any) -> str:
    """What is said of a run that cannot be."""
    try:
        fit(create_model("p4cnn", width=2), pictures(13, 0), Recipe(**{**RECIPE, **options}), seed=0, label=None)
    except InputError as error:
        return str(error)
    return "nothing"


def program(folder: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    with joined("cpu") as device:
        assert (device, processes(), rank()) == ("cpu", 2, int(os.environ["RANK"]))
        found: dict[str, Any] = {name: trained(case) for name, case in CASES.items()}
        found["sum"] = sum_over_processes(torch.tensor([1.0, rank()]))
        found["diverged"] = refused(learning_rate=1e30)
        maps = pictures(4, 2).images.double()[:, :, :6, :6].reshape(4, 3, 4, 3, 1)[2 * rank() :][:2].requires_grad_()
        layer = norm.GroupBatchNorm2d(3, dtype=DOUBLE)
        (layer(maps) * torch.linspace(-1, 2, 36, dtype=DOUBLE).view(3, 4, 3, 1)).sin().sum().backward()
        found["norm"] = maps.grad, sum_over_processes(layer.weight.grad), layer.running_mean, layer.running_var
        norm.processes = lambda: 1
        found["apart"] = trained({})
    assert processes() == 1
    torch.save(found, folder / f"{rank()}-{os.environ['RANK']}.pt")


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """Of both processes."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    both = []
    for number in ("0", "1"):
        as_torchrun = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **as_torchrun)
        argv = [sys.executable, __file__, str(folder)]
        both.append(subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"0-{number}.pt") for number in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: trained(case) for name, case in CASES.items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_network_of_one(found, alone, name):
    tolerance = TOLERANCE.get(name, 1e-10)
    history, weights = alone[name]
    for ours, theirs in (process[name] for process in found):
        assert len(ours) == len(history) == 2
        for row, expected in zip(ours, history, strict=True):
            assert row == pytest.approx(expected, rel=tolerance, abs=tolerance if name != "half" else 20)
        assert distance(theirs, weights) < WEIGHTS.get(name, 1e-10)


def test_both_processes_have_the_same_bits(found):
    for name in CASES:
        assert found[0][name][0] == found[1][name][0]
        assert distance(found[0][name][1], found[1][name][1]) == 0


def test_it_would_be_seen_if_each_normalised_its_own_part(found, alone):
    assert distance(found[0]["apart"][1], alone["plain"][1]) > 1e-2
    assert abs(found[0]["apart"][0][-1]["train_loss"] - alone["plain"][0][-1]["train_loss"]) > 1e-4


def test_a_batch_norm_over_two_processes_is_one_over_both_their_maps(found):
    maps = pictures(4, 2).images.double()[:, :, :6, :6].reshape(4, 3, 4, 3, 1).requires_grad_()
    layer = nn.BatchNorm3d(3, dtype=DOUBLE)
    (layer(maps) * torch.linspace(-1, 2, 36, dtype=DOUBLE).view(3, 4, 3, 1)).sin().sum().backward()
    torch.testing.assert_close(torch.cat([process["norm"][0] for process in found]), maps.grad)
    for process in found:
        torch.testing.assert_close(process["norm"][1:], (layer.weight.grad, layer.running_mean, layer.running_var))


def test_sums_are_over_both(found):
    assert all(process["sum"].tolist() == [2, 1] for process in found)


def test_divergence_is_told_by_both_and_leaves_neither_waiting(found):
    assert found[0]["diverged"] == found[1]["diverged"]
    assert found[0]["diverged"].startswith("training diverged in epoch")


def test_a_batch_smaller_than_the_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setattr(steps, "processes", lambda: 4)
    monkeypatch.setattr(steps, "DistributedDataParallel", lambda model, **_: model)
    with pytest.raises(InputError, match=r"^the last batch has 3 images for 4 processes; give another batch size$"):
        trained({})


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with joined("auto") as device:
        assert (device, processes(), rank()) == ("auto", 1, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cpu") as device:
        assert (device, processes(), rank()) == ("cpu", 1, 0)
    values = torch.ones(2)
    assert sum_over_processes(values) is values


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("WORLD_SIZE", "99"), ("LOCAL_RANK", "98")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="process 98 of this machine has no GPU of its own"), joined("cuda"):
        pytest.fail("it must not begin")


def test_the_command_under_torchrun(tmp_path, monkeypatch):
    """The real command: one network, one result, and that of one process that sums up as several do."""
    monkeypatch.setattr("gconv.nn.batchnorm.is_supported", lambda *_: False)
    train = "-m gconv.train rotdigits --model p4cnn --width 1 --epochs 1 --batch-size 300 --weight-decay 0.1"
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *train.split()]
    done = subprocess.run(
        [*argv, "--out", "two.pt"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("p4cnn: test error ")
    assert done.stderr.count("p4cnn on rotdigits: epoch 1/1") == 1
    assert os.listdir(tmp_path) == ["two.pt"]

    from gconv.training.datasets import load_dataset

    two, digits = checkpoint.read(tmp_path / "two.pt"), load_dataset("rotdigits")
    assert two.record["environment"]["processes"] == 2
    torch.manual_seed(0)
    model = create_model("p4cnn", width=1)
    recipe = Recipe.from_dict(two.record["recipe"])
    (row,) = fit(model, digits.train, recipe, seed=0, validation=digits.validation, label=None)
    assert distance(two.model.state_dict(), model.state_dict()) < WEIGHTS["single"]
    assert two.record["history"][0]["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)
    assert two.record["test_error"] == pytest.approx(evaluate(model, digits.test).error, abs=1)


if __name__ == "__main__":
    program(Path(sys.argv[1]))
