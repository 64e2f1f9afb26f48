"""The notebooks run as they are, on the shipped files alone, and what they store and say is what comes out."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import analysis

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
NETWORKS = ("p4cnn-rotmnist-regen", "p4cnn-rotdigits", "p4m-cnn-rotdigits")
NUMBER = re.compile(r"-?\d+\.\d+")

# Numbers of three decimals, unless a notebook's tables have two.
PRECISE = {"rotated_mnist": r"\b\d+\.\d{2}\b"}

# What would be logic of the notebook's own.
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.Try)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """The text that a cell put out."""
    return [
        output.text if output.output_type == "stream" else text
        for output in cell.outputs
        for kind, text in sorted(output.get("data", {"text/plain": ""}).items())
        if kind in ("text/plain", "text/markdown")
    ]


def execute(notebook, directory, folder):
    """Run in a copy of what the repository ships, with Jupyter's files, and the kernel, kept to the copy."""
    for name in ("checkpoints", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "notebooks").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder / name.lower()))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")  # nobody answers: there is no network
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("MPLBACKEND", raising=False)
        resources = {"metadata": {"path": str(folder / directory)}}
        return NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()


# That of conversion converts for minutes; what it calls is tested on its own.
EXECUTED = [path for path in NOTEBOOKS if path.stem != "conversion"]


@pytest.fixture(scope="module", params=EXECUTED, ids=lambda path: path.stem)
def stored_and_executed(request, tmp_path_factory):
    fresh = read(request.param)
    for cell in code(fresh):
        cell.outputs = []
    return read(request.param), execute(fresh, "notebooks", tmp_path_factory.mktemp("copy"))


def test_there_is_a_notebook():
    assert EXECUTED


def test_running_it_gives_what_is_stored(stored_and_executed):
    stored, executed = stored_and_executed
    for old, new in zip(code(stored), code(executed), strict=True):
        assert [sorted(output.data) for output in old.outputs] == [sorted(output.data) for output in new.outputs]
        for before, after in zip(texts(old), texts(new), strict=True):
            assert NUMBER.sub("#", before).split() == NUMBER.sub("#", after).split()
            numbers = [[float(number) for number in NUMBER.findall(text)] for text in (before, after)]
            assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_starts_from_the_root_of_the_repository_too(path, tmp_path):
    notebook = read(path)
    notebook.cells = code(notebook)[:1]
    execute(notebook, ".", tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestStored:
    def test_every_cell_ran_in_order_and_nothing_was_printed_to_stderr(self, path):
        cells = code(read(path))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        for cell in cells:
            assert {output.output_type for output in cell.outputs} <= {"display_data", "execute_result"}
        assert sum("image/png" in output.data for cell in cells for output in cell.outputs) >= 5

    def test_it_has_no_logic_of_its_own(self, path):
        for cell in code(read(path)):
            assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, LOGIC)], cell.source

    def test_every_figure_is_followed_by_what_it_shows_and_what_it_does_not(self, path):
        cells = read(path).cells
        for number, cell in enumerate(cells):
            if any("image/png" in output.data for output in cell.get("outputs", [])):
                after = next(later.source for later in cells[number:] if later.cell_type == "markdown")
                assert "*Shows.*" in after
                assert "*Does not show.*" in after

    def test_precise_numbers_in_the_text_were_put_out(self, path):
        notebook = read(path)
        precise = PRECISE.get(path.stem, r"\b0\.\d{3}\b")
        said = {n for cell in notebook.cells if cell.cell_type == "markdown" for n in re.findall(precise, cell.source)}
        found = {n for cell in code(notebook) for text in texts(cell) for n in NUMBER.findall(text)}
        assert said <= found
        assert said

    def test_it_is_small_and_says_nothing_of_where_and_when_it_ran(self, path):
        notebook = read(path)
        assert path.stat().st_size < 1_500_000
        assert set(notebook.metadata) == {"kernelspec", "language_info"}
        assert not any(cell.metadata for cell in notebook.cells)
        assert str(ROOT) not in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables():
    return {name: analysis.redundancy(ROOT / "checkpoints" / f"{name}.pt").to_frame() for name in NETWORKS}


def at_rank_1(frame, measure, part):
    """The rows of one measure, by layer."""
    rows = frame[(frame["measure"] == measure) & (frame["part"] == part)]
    return rows[rows["rank"].isna() | rows["rank"].eq(1)].set_index("layer")


class TestConclusions:
    """What ``redundancy.ipynb`` concludes, from the measures themselves."""

    @pytest.mark.parametrize("form", ["g", "gc", "gc_in"])
    def test_all_full_layers_are_closer_to_separable_than_both_nulls(self, tables, form):
        for frame in tables.values():
            rows = at_rank_1(frame, "explained_energy", form)
            assert list(rows.index) == [*(f"conv{i}" for i in range(2, 8)), "(network)"]
            assert (rows["value"] > rows["init_high"]).all()
            assert (rows["value"] > rows["shuffled_high"]).all()

    def test_near_invariance_holds_on_the_digits_only(self, tables):
        for name, frame in tables.items():
            rows = at_rank_1(frame, "invariance", "average")
            network, second = rows.loc["(network)"], rows.loc["conv2"]
            if name == "p4cnn-rotmnist-regen":
                assert network["init_high"] < network["value"] < 0.3
                assert second["init_low"] <= second["value"] <= second["init_high"]
            else:
                assert network["value"] > network["init_mean"] + 0.08
                assert second["value"] > second["init_mean"] + 0.2

    def test_deep_layers_do_not_share_more_across_input_channels(self, tables):
        for frame in tables.values():
            rows = at_rank_1(frame, "explained_energy", "gc")["value"]
            assert rows["conv6"] < rows["conv2"]
            channels = at_rank_1(frame, "effective_rank", "in")["value"]
            assert channels["conv6"] > channels["conv2"]

    def test_gc_in_rises_with_depth_on_rotated_mnist(self, tables):
        rows = at_rank_1(tables["p4cnn-rotmnist-regen"], "explained_energy", "gc_in")["value"]
        assert rows["conv2"] == pytest.approx(0.31, abs=5e-3)
        assert rows["conv6"] == pytest.approx(0.36, abs=5e-3)

    def test_the_p4m_network_is_most_invariant_in_its_first_layers(self, tables):
        frame = tables["p4m-cnn-rotdigits"]
        trivial = at_rank_1(frame, "irrep_energy", "A1")
        assert (trivial["value"] > trivial["init_high"]).all()
        assert trivial["value"].drop("(network)").is_monotonic_decreasing
        for irrep, share in (("A2", 1 / 8), ("E", 1 / 2)):
            assert (at_rank_1(frame, "irrep_energy", irrep)["value"] < share).all()
            assert (at_rank_1(frame, "irrep_energy_turned", irrep)["value"] < share).all()

    @pytest.mark.parametrize("name", ["p4cnn-rotmnist-regen", "p4m-cnn-rotdigits"])
    def test_redundancy_is_learned_and_early(self, name):
        paths = [ROOT / "checkpoints" / name / f"epoch-{epoch:03}.pt" for epoch in (0, 2, 50)]
        frame = analysis.redundancy_over_epochs(paths).to_frame()
        for form in ("g", "gc", "gc_in"):
            rows = at_rank_1(frame, "explained_energy", form).loc["(network)"].set_index("epoch")
            assert rows["init_low"][0] <= rows["value"][0] <= rows["init_high"][0]
            assert rows["value"][2] - rows["value"][0] > 0.5 * (rows["value"][50] - rows["value"][0])
