"""Output that is there as a whole or not at all."""

import pytest

from adapmoe_lab.demo.publish import staged_folder, write_lines


def files_of(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def fail_halfway(target, error):
    with staged_folder(target) as staged:
        (staged / "model.safetensors").write_text("half")
        raise error


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "models" / "demo"
    with staged_folder(target) as staged:
        (staged / "config.json").write_text("{}")
        (staged / "model.safetensors").write_text("weights")
        assert not target.exists()
        assert staged.parent == target.parent
    assert files_of(target) == {"config.json": "{}", "model.safetensors": "weights"}
    assert [path.name for path in target.parent.iterdir()] == ["demo"]


def test_a_failure_leaves_no_folder(tmp_path):
    target = tmp_path / "demo"
    with pytest.raises(RuntimeError, match="out of memory"):
        fail_halfway(target, RuntimeError("out of memory"))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_an_earlier_folder_as_it_was(tmp_path):
    target = tmp_path / "demo"
    target.mkdir()
    (target / "model.safetensors").write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        fail_halfway(target, KeyboardInterrupt())
    assert files_of(target) == {"model.safetensors": "earlier"}
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_new_checkpoint_replaces_every_shard_of_the_earlier_one_and_nothing_else(tmp_path):
    target = tmp_path / "demo"
    target.mkdir()
    for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json", "notes.md"):
        (target / name).write_text("earlier")
    (target / "config.json").write_text("earlier")
    with staged_folder(target) as staged:
        (staged / "model.safetensors").write_text("new")
        (staged / "config.json").write_text("new")
    assert files_of(target) == {
        "config.json": "new",
        "model.safetensors": "new",
        "notes.md": "earlier",
    }


def test_weights_stay_where_no_new_ones_come(tmp_path):
    target = tmp_path / "demo"
    target.mkdir()
    (target / "model.safetensors").write_text("weights")
    with staged_folder(target) as staged:
        (staged / "README.md").write_text("card")
    assert files_of(target) == {"README.md": "card", "model.safetensors": "weights"}


def test_a_target_that_is_a_file_is_refused_before_any_work(tmp_path):
    target = tmp_path / "demo"
    target.write_text("a file")
    with pytest.raises(NotADirectoryError, match="is a file; name a folder"):
        staged_folder(target).__enter__()
    assert target.read_text() == "a file"


def test_published_files_are_readable_by_all(tmp_path):
    with staged_folder(tmp_path / "demo") as staged:
        (staged / "config.json").touch(mode=0o600)
    write_lines(tmp_path / "lines.txt", ["a"])
    for path in (tmp_path / "demo" / "config.json", tmp_path / "lines.txt"):
        assert path.stat().st_mode & 0o777 == 0o644


def test_lines_are_utf_8_and_each_ends(tmp_path):
    path = tmp_path / "new" / "lines.txt"
    write_lines(path, ["one", "zwölf", ""])
    assert path.read_bytes() == "one\nzwölf\n\n".encode()
    assert [found.name for found in path.parent.iterdir()] == ["lines.txt"]


def test_lines_that_fail_leave_the_earlier_file(tmp_path):
    def lines():
        yield "first"
        raise KeyboardInterrupt

    path = tmp_path / "lines.txt"
    with pytest.raises(KeyboardInterrupt):
        write_lines(path, lines())
    assert list(tmp_path.iterdir()) == []
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        write_lines(path, lines())
    assert files_of(tmp_path) == {"lines.txt": "earlier"}
