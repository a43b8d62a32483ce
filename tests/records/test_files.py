"""Whether a file can be put somewhere, found out before the work and without a trace."""

import errno
import tempfile

import numpy as np
import pytest

from adapmoe_lab.records.files import RecordError, check_writable, json_bytes, save_json


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


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"a": 1.0, "b": {"c": [0.5, (1, np.inf)]}, "d": np.nan}, r"b\.c\[1\]\[1\] is inf"),
        ({"a": {"b": np.float64("nan")}}, r"a\.b is nan"),
        ([float("-inf")], r"\[0\] is -inf"),
    ],
)
def test_the_first_number_that_is_not_finite_is_named(tmp_path, document, place):
    with pytest.raises(RecordError, match=rf"^{place}, and only finite numbers can be saved"):
        save_json(tmp_path / "a.json", document, allow_nan=False)
    assert not list(tmp_path.iterdir())


def test_what_is_no_json_for_another_reason_stays_an_error_of_json():
    with pytest.raises(ValueError, match="Out of range") as caught:
        json_bytes({float("nan"): 1}, allow_nan=False)
    assert caught.type is ValueError
