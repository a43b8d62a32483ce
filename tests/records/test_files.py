"""Whether a file can be put somewhere, found out before the work and without a trace."""

import errno
import tempfile

import pytest

from adapmoe_lab.records.files import check_writable, save_json


@pytest.mark.parametrize("name", ["a.json", "new/folders/a.json", "there.json"])
def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path, name):
    (tmp_path / "there.json").write_text("kept")
    check_writable(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "kept"
    save_json(tmp_path / name, {})


def test_a_relative_name_is_taken_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("a.json")


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        NotADirectoryError, match=r"file/new/a\.json cannot be written: .*file is no"
    ):
        check_writable(tmp_path / "file" / "new" / "a.json")
    with pytest.raises(IsADirectoryError, match="is a folder; name a file to write"):
        check_writable(tmp_path)


def test_a_folder_that_takes_no_files_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        PermissionError, match=r"takes no files \(Permission denied\)\. Name another"
    ):
        check_writable(tmp_path / "a.json")
