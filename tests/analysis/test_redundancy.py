"""The table and its command: shape, files, what a trained network shows, and what is said about bad input."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analysis import block_redundancy, filter_banks, redundancy, redundancy_over_epochs
from analysis.measures.measures import MEASURED_FORMS
from analysis.measures.table import COLUMNS, NETWORK
from analysis.redundancy import main
from gconv import GConv2d, InputError, LiftingConv2d, create_model, load, save
from gconv.functional.expansion import expand
from tests.strict_python import STRICT_PYTHON

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
TRAINED = CHECKPOINTS / "p4cnn-rotmnist-regen.pt"
SNAPSHOTS = sorted((CHECKPOINTS / "p4cnn-rotmnist-regen").glob("epoch-*.pt"))


@pytest.fixture(scope="module")
def trained():
    return redundancy(load(TRAINED))


# ------------------------------------------------------------------------------------------------- a trained network


@pytest.mark.parametrize("form", MEASURED_FORMS)
def test_trained_energy_lies_outside_the_null_band_in_every_layer(trained, form):
    frame = trained.to_frame()
    first = frame[(frame.measure == "explained_energy") & (frame.part == form) & (frame["rank"] == 1)]
    assert list(first.layer) == [*(f"conv{number}" for number in range(2, 8)), NETWORK]
    for null in ("init", "shuffled"):
        assert (first.value > first[f"{null}_high"]).all()
        assert (first[f"{null}_z"] > 5).all()


def test_trained_energy_is_what_was_measured_before(trained):
    frame = trained.to_frame()
    g = frame[(frame.measure == "explained_energy") & (frame.part == "g") & (frame["rank"] == 1)]
    g = g[g.kernel_size == 3]
    assert g.value.mean() == pytest.approx(0.60, abs=0.01)
    assert g.init_mean.mean() == pytest.approx(0.47, abs=0.01)


def test_redundancy_is_learned_in_the_course_of_training():
    frame = redundancy_over_epochs(reversed(SNAPSHOTS), draws=5).to_frame()
    assert list(frame.epoch.unique()) == [0, 1, 2, 5, 10, 20, 50]
    network = frame[(frame.layer == NETWORK) & (frame["rank"] == 1) & (frame.measure == "explained_energy")]
    for form in MEASURED_FORMS:
        z = network[network.part == form].set_index("epoch").init_z
        assert abs(z[0]) < 5
        assert (z[1:] > 10).all()
    nulls = frame.pivot(index=["layer", "measure", "part", "rank"], columns="epoch", values="init_mean")
    assert (nulls.isna().all(axis=1) | (nulls.nunique(axis=1) == 1)).all()  # one seed: one initialisation


# --------------------------------------------------------------------------------------------------------- the table


def test_frame_is_tidy(trained):
    frame = trained.to_frame()
    assert tuple(frame.columns) == COLUMNS
    assert not frame.duplicated(["layer", "measure", "part", "rank"]).any()
    layers = frame.drop_duplicates("layer").set_index("layer")
    assert list(layers.index) == [*(f"conv{number}" for number in range(1, 8)), NETWORK]
    assert list(layers.depth[:-1]) == list(range(7))
    assert list(layers.kind) == ["lifting", *["full"] * 6, "network"]
    assert layers.loc["conv7", ["group", "out_channels", "in_channels", "kernel_size"]].tolist() == ["p4", 10, 10, 4]
    assert layers.loc[NETWORK, ["depth", "out_channels", "in_channels", "kernel_size"]].isna().all()
    assert set(frame.measure) == {
        *("explained_energy", "pca_explained_variance", "hosvd_energy", "effective_rank", "stable_rank"),
        *("rank_90", "rank_95", "rank_99", "cosine", "invariance", "irrep_energy"),
        *("cosine_turned", "invariance_turned", "irrep_energy_turned"),
    }
    ranked = frame["rank"].notna()
    assert set(frame[ranked].measure) == {"explained_energy", "pca_explained_variance", "hosvd_energy"}
    assert set(frame[frame.measure == "irrep_energy"].part) == {"A", "B", "E"}
    assert set(frame[frame.measure == "invariance"].part) == {"average", "r", "r2", "r3"}
    assert frame.value.notna().all()
    assert (frame.init_low <= frame.init_mean).all()
    assert (frame.init_mean <= frame.init_high).all()


def test_the_same_seed_gives_the_same_table_whatever_the_threads(trained):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = redundancy(load(TRAINED))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(trained.to_frame(), again.to_frame(), check_exact=False, rtol=1e-9)
    other = redundancy(load(TRAINED), seed=1).to_frame()
    np.testing.assert_array_equal(other.value, trained.to_frame().value)
    assert (other.init_mean != trained.to_frame().init_mean).any()


def test_a_file_a_network_and_its_banks_are_measured_alike(trained):
    for source in (TRAINED, str(TRAINED), filter_banks(load(TRAINED)), list(filter_banks(load(TRAINED)))):
        pd.testing.assert_frame_equal(redundancy(source).to_frame(), trained.to_frame(), rtol=1e-9)


def test_csv_and_json_say_what_the_frame_says(trained, tmp_path):
    trained.to_csv(tmp_path / "table.csv")
    frame = trained.to_frame()
    read = pd.read_csv(tmp_path / "table.csv")
    assert tuple(read.columns) == COLUMNS
    np.testing.assert_allclose(read.value, frame.value)
    np.testing.assert_allclose(read.init_z, frame.init_z)
    document = json.loads(json.dumps(trained.to_dict(), allow_nan=False))
    assert (document["draws"], document["seed"], document["skipped"]) == (20, 0, [])
    assert [row["value"] for row in document["rows"]] == frame.value.tolist()
    assert sum(row["init_z"] is None for row in document["rows"]) == frame.init_z.isna().sum()


def test_without_draws_there_are_values_alone():
    frame = redundancy(load(TRAINED), draws=0).to_frame()
    assert frame.value.notna().all()
    assert frame[[column for column in COLUMNS if column.startswith(("init", "shuffled"))]].isna().all(axis=None)


def test_blocks_are_measured_one_by_one():
    bank = filter_banks(load(TRAINED))[2]
    table = block_redundancy(bank)
    assert table.groupby("part").block.nunique()[list(MEASURED_FORMS)].tolist() == [100, 10, 10]
    one = table[(table.measure == "irrep_energy") & (table.block == 37)].set_index("part").value
    kernels = bank.weight[3, 7]
    assert one["A"] == pytest.approx(4 * kernels.mean(0).square().sum().item() / kernels.square().sum().item())
    assert one.sum() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------- other networks


def degenerate():
    planar = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5, groups=8)
    )
    zeros = create_model("p4cnn", width=2)
    nn.init.zeros_(zeros.conv3.weight)
    nothing = create_model("p4cnn", width=2)
    for parameter in nothing.parameters():
        nn.init.zeros_(parameter)
    return {
        "planar": planar,
        "1x1 only": nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)),
        "one channel": create_model("p4cnn", width=1),
        "a layer of zeros": zeros,
        "zeros throughout": nothing,
        "separable": create_model("gc-p4cnn", width=3),
        "one number": nn.Conv2d(1, 1, 1),
        "one kernel": nn.Conv2d(1, 1, 3),
    }


@pytest.mark.parametrize("name", degenerate())
def test_odd_networks_give_sensible_rows(name):
    table = redundancy(degenerate()[name], draws=3)
    frame = table.to_frame()
    assert not frame.empty
    ranked = frame[frame["rank"].notna()]
    assert ranked.value.between(0, 1 + 1e-12).all()
    undefined = set(frame[frame.value.isna()].measure.str.removesuffix("_turned"))
    assert undefined == ({"cosine", "invariance", "irrep_energy"} if "zeros" in name else set())
    assert (NETWORK in set(frame.layer)) == (name != "zeros throughout")
    assert frame[frame.layer == NETWORK].value.notna().all()
    json.dumps(table.to_dict(), allow_nan=False)


def test_a_network_without_convolutions_gives_an_empty_table():
    table = redundancy(nn.Linear(2, 2))
    assert table.rows == []
    assert tuple(table.to_frame().columns) == COLUMNS


def test_what_a_form_forces_on_a_layer_does_not_pass_for_learned():
    frame = redundancy(create_model("gc-p4cnn", width=4)).to_frame()
    forced = frame[(frame.measure == "explained_energy") & (frame.part == "gc") & (frame.kind == "gc")]
    np.testing.assert_allclose(forced.value, 1, atol=1e-9)
    np.testing.assert_allclose(forced.init_mean, 1, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("draws", "seed"), [(1, 0), (-1, 0), (2.5, 0), (2, -1), (2, "x")])
def test_draws_and_seed_are_checked(draws, seed):
    with pytest.raises(InputError, match="give a whole number of at least"):
        redundancy(nn.Conv2d(1, 2, 3), draws=draws, seed=seed)


def test_weights_that_are_not_finite_are_named():
    network = create_model("p4cnn", width=2)
    nn.init.constant_(network.conv4.weight, float("nan"))
    with pytest.raises(InputError, match="NaN or infinite entries in conv4"):
        redundancy(network)


def test_snapshots_must_be_of_one_run(tmp_path):
    unknown, other = tmp_path / "unknown.pt", tmp_path / "other.pt"
    save(create_model("p4cnn"), unknown)
    save(create_model("p4cnn", width=3), other, record={"epoch": 7})
    for files, said in (
        ([SNAPSHOTS[0], unknown], f"the record of {unknown} has no epoch"),
        ([SNAPSHOTS[0], SNAPSHOTS[0]], "are both of epoch 0"),
        ([SNAPSHOTS[0], other], f"{other} is not a snapshot of the network in"),
    ):
        with pytest.raises(InputError, match=said):
            redundancy_over_epochs(files, draws=0)


# -------------------------------------------------------------------------------------------------------- the command


def test_command_prints_a_line_for_each_layer_and_writes_the_table(tmp_path, capsys):
    out = tmp_path / "table.csv"
    assert main([str(TRAINED), "--draws", "3", "--csv", str(out)]) == 0
    printed = capsys.readouterr().out
    for layer in (*(f"conv{number}" for number in range(1, 8)), NETWORK):
        assert layer in printed
    assert "0.60 (0.47" in printed
    assert len(pd.read_csv(out)) == len(redundancy(TRAINED, draws=0).rows)
    assert main([str(TRAINED), "--csv", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([str(TRAINED), "--draws", "0", "--csv", str(out), "--force"]) == 0


def test_json_is_one_document_on_stdout(capsys):
    assert main([str(TRAINED), "--draws", "2", "--seed", "3", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["files"], document["draws"], document["seed"]) == ([str(TRAINED)], 2, 3)
    assert "conv7" in captured.err


def test_several_files_are_shown_against_the_epoch(capsys):
    assert main([*map(str, SNAPSHOTS[:3]), "--draws", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("0", "1", "2")] == ["0", "1", "2"]
    assert any(line[-3:] == ["0", "1", "2"] for line in lines)


def test_no_convolutions_is_said(tmp_path, capsys):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    assert main([str(tmp_path / "linear.pt")]) == 0
    assert "nothing to measure" in capsys.readouterr().out


def test_if_no_convolution_can_be_measured_the_error_says_why(tmp_path, capsys):
    network = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3), nn.Conv1d(3, 3, 3), nn.Linear(3, 3))
    with pytest.raises(InputError) as error:
        redundancy(network)
    for text in (
        "none of the convolutions can be measured",
        "skipped 0, 2: it is a Conv1d",
        "1: it is a ConvTranspose2d",
    ):
        assert text in str(error.value)
    torch.save(nn.Conv1d(2, 3, 3).state_dict(), tmp_path / "audio.pt")
    assert main([str(tmp_path / "audio.pt")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "1-D convolution" in captured.err


def test_what_is_printed_is_short_and_says_what_there_is(trained):
    text = repr(trained)
    assert f"7 layers, {len(trained.rows)} rows, " in text
    assert "20 draws per null, seed 0" in text
    assert len(text) < 200
    html = trained._repr_html_()
    assert "7 layers" in html
    assert html.count("<tr") < 15
    audio = redundancy(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv1d(3, 3, 3)), draws=0)
    assert "1 layer, " in repr(audio)
    assert "without nulls" in repr(audio)
    assert "skipped 1: it is a Conv1d" in repr(audio)
    assert "skipped 1: it is a Conv1d" in audio._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "FILE"),
        (["absent.pt"], "absent.pt does not exist"),
        ([str(CHECKPOINTS)], "is a directory"),
        ([__file__], "test_redundancy.py"),
        ([str(TRAINED), "--draws", "1"], "--draws is 1"),
        ([str(TRAINED), "--draws", "-2"], "--draws"),
        ([str(TRAINED), "--seed", "x"], "--seed"),
        ([str(TRAINED), "--group", "p5"], "unknown group 'p5'"),
        ([str(TRAINED), "--group", "p4m"], "p4m"),
        ([str(TRAINED), str(TRAINED)], "are both of epoch 50"),
        ([str(TRAINED), str(TRAINED), "--group", "p4"], "--group is for one FILE"),
        ([str(TRAINED), "--csv", str(CHECKPOINTS), "--force"], "it is a directory"),
        ([str(TRAINED), "--csv", f"{__file__}/table.csv"], "is not a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, capsys):
    try:
        code = main(arguments)
    except SystemExit as stopped:  # argparse's own way out
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("python -m analysis.redundancy: error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def fresh(code):
    return subprocess.run([*STRICT_PYTHON, *code], capture_output=True, text=True, timeout=120)


def test_help_does_not_wait_for_pytorch():
    code = "import sys; from analysis.redundancy import parser; parser(); sys.exit('torch' in sys.modules)"
    assert fresh(["-c", code]).returncode == 0
    shown = fresh(["-m", "analysis.redundancy", "--help"])
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--draws" in shown.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import analysis; analysis.redundancy(net, draws=0); import analysis.redundancy",
        "import analysis.redundancy; import analysis",
        "from analysis import redundancy as f; import analysis.redundancy; f(net, draws=0)",
        "from analysis.redundancy import main; import analysis; from analysis import redundancy as f; f(net, draws=0)",
    ],
)
def test_function_and_command_share_their_name_in_any_order(imports):
    used = "assert analysis.redundancy(net, draws=0).rows; assert sys.modules['analysis.redundancy'].main"
    ran = fresh(["-c", f"import sys, torch; net = torch.nn.Conv2d(2, 3, 3)\n{imports}\n{used}"])
    assert ran.returncode == 0, ran.stderr


def test_generators_taken_back_from_expanded_filters_have_their_residual_and_a_warning():
    layers = [LiftingConv2d(1, 3, 3, group="p4"), GConv2d(3, 3, 3, group="p4"), GConv2d(3, 3, 3, group="p4")]
    state = {f"{i}.weight": expand(layer.weight, layer.tables.expansion).detach() for i, layer in enumerate(layers)}
    state = {name: weight + 1e-3 * weight.std() * torch.randn_like(weight) for name, weight in state.items()}
    table = redundancy(state, group="p4", draws=2)
    residual = table.to_frame().residual.max()
    assert 1e-4 < residual < 1e-2
    assert any(f"relative residual up to {residual:.1e}" in note for note in table.notes)
    assert redundancy(layers[1], draws=0).notes == []
