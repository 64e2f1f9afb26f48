"""Writing files: whole or not at all, and never over what the user did not give up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gconv.system.errors import InputError
from gconv.system.files import atomic_path, check_output

needs_permissions = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
)


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_half(target: Path, error: type[BaseException]) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.mark.parametrize("name", ["net.pt", "net", "deep/down/net.pt", "a.b.c", "sp ace.pt"])
def test_the_file_appears_whole_and_alone(tmp_path, name):
    target = tmp_path / name
    with atomic_path(target) as temporary:
        assert (temporary.parent, temporary.suffix) == (target.parent, target.suffix)
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == [target.name]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "net.pt"
    target.write_text("old")
    with atomic_path(str(target)) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert below(tmp_path) == ["net.pt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "net.pt"
    target.write_text("old")
    with pytest.raises(error):
        write_half(target, error)
    assert target.read_text() == "old"
    assert below(tmp_path) == ["net.pt"]


def test_an_error_of_the_disk_is_the_inputs_fault(tmp_path):
    message = r"^cannot write .*net\.pt: No space left on device$"
    with pytest.raises(InputError, match=message), atomic_path(tmp_path / "net.pt"):
        raise OSError(28, "No space left on device")
    assert below(tmp_path) == []


def test_the_file_gets_the_users_permissions_not_those_of_temporary_files(tmp_path, umask):
    with atomic_path(tmp_path / "net.pt"):
        pass
    assert (tmp_path / "net.pt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_cannot_be_written_is_one_line_that_names_it(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for target, why in [
        (tmp_path / "folder", "it is a directory"),
        (tmp_path / "file/net.pt", "(Not a directory|File exists)"),
        (tmp_path / "file/deep/net.pt", "Not a directory"),
        (tmp_path / ("x" * 300 + ".pt"), "File name too long"),
    ]:
        with pytest.raises(InputError, match=f"cannot write {target}: {why}$"), atomic_path(target):
            pytest.fail("the block must not run")
    assert below(tmp_path) == ["file", "folder"]


# --- the check before the work


def test_a_new_output_passes_and_nothing_is_made(tmp_path):
    for target in (tmp_path / "net.pt", str(tmp_path / "deep/down/net.pt")):
        assert check_output(target, force=False) == Path(target)
    assert below(tmp_path) == []


def test_an_output_that_exists_needs_force(tmp_path):
    target = tmp_path / "net.pt"
    target.write_text("mine")
    with pytest.raises(InputError, match=r"net\.pt exists; choose another output or replace it with --force$"):
        check_output(target, force=False)
    assert check_output(target, force=True) == target
    assert target.read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path, force):
    (tmp_path / "file").write_text("x")
    for target, why in [
        (tmp_path / "file/net.pt", "file is not a directory"),
        (tmp_path / "file/deep/net.pt", "file is not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / ("x" * 300) / "net.pt", "File name too long"),
    ]:
        with pytest.raises(InputError, match=f"cannot write {target}: .*{why}$"):
            check_output(target, force=force)


@needs_permissions
def test_an_unwritable_directory_is_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(InputError, match="locked is not writable"):
        check_output(locked / "deep/net.pt", force=False)
    with pytest.raises(InputError, match="Permission denied"), atomic_path(locked / "net.pt"):
        pytest.fail("the block must not run")
