import os

import pytest

from pbsp.errors import OutputError
from pbsp.storage.folder import check_output, folder_bytes, new_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_whole_and_leaves_nothing_else(tmp_path):
    with new_folder(tmp_path / "deep" / "out", overwrite=False) as partial:
        (partial / "a.bin").write_bytes(b"12345")
        assert not (tmp_path / "deep" / "out").exists()
    assert folder_bytes(tmp_path / "deep" / "out") == {"a.bin": 5}
    assert names(tmp_path / "deep") == ["out"]


def fill_halfway(out, error):
    with new_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_the_old_folder_and_no_partial_one(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("kept")
    with pytest.raises(error):
        fill_halfway(out, error)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old"]


def test_a_full_disk_is_an_output_error(tmp_path):
    with (
        pytest.raises(OutputError, match="nothing was left behind"),
        new_folder(tmp_path / "out", overwrite=False),
    ):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_overwrite_replaces_the_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        check_output(out, overwrite=False)
    with new_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("y")
    assert names(out) == ["new"]


def test_a_file_and_an_unwritable_parent_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "new", overwrite=False)
