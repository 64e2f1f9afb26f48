"""The one reader of files: every format that PyTorch users have means the same to everything that reads files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from analysis import decompose, load_source, redundancy
from gconv import InputError, create_model, load, save
from gconv.system.tensor_files import read_plain

FORMATS = {
    "net.pt": torch.save,
    "net.pth": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "net.safetensors": save_file,
}
every_format = pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=["zip", "old", "safetensors"])


@every_format
def test_the_content_comes_back(tmp_path, name, write):
    state = {"a": torch.randn(3, 2), "b": torch.tensor(7)}
    write(state, tmp_path / name)
    for path in (tmp_path / name, str(tmp_path / name)):
        found = read_plain(path)
        assert found.keys() == state.keys()
        assert all(found[key].equal(state[key]) for key in state)


@every_format
def test_all_readers_agree_on_what_a_file_is(tmp_path, capsys, name, write):
    """A sound state dict is no damaged file to anybody, whatever its format."""
    state = create_model("p4cnn", width=2).state_dict()
    write(dict(state), tmp_path / name)
    assert load_source(tmp_path / name).keys() == state.keys()
    assert len({row["layer"] for row in redundancy(tmp_path / name, draws=0).rows}) > 1
    with pytest.raises(InputError, match="is not a gconv checkpoint"):
        load(tmp_path / name)
    assert decompose.main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    assert "damaged" not in capsys.readouterr().err


def test_a_checkpoint_that_was_written_again_in_the_old_format(tmp_path):
    model = create_model("gc-p4cnn", width=2)
    save(model, tmp_path / "zip.pt")
    content = torch.load(tmp_path / "zip.pt", weights_only=True)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    back = load(tmp_path / "old.pt").state_dict()
    assert all(back[key].equal(value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_without_permission(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"net{suffix}"
    FORMATS[f"net{suffix}"]({"a": torch.ones(2)}, path)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr("safetensors.torch.load_file", denied)
    with pytest.raises(InputError, match=f"^cannot read {path}: Permission denied$"):
        read_plain(path)
