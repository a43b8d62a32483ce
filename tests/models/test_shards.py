"""Where tensors lie is read from real safetensors files, and every damage is told by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapmoe_lab.models.checkpoint.shards import CheckpointError, read_index, weight_files

META = '{"metadata": {}, '
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def save_sharded(folder: Path) -> Path:
    first = {
        "router": torch.arange(12.0).reshape(3, 4).bfloat16(),
        "codes": torch.arange(7, dtype=torch.uint8),
    }
    second = {
        "expert": torch.randn(2, 5, generator=torch.Generator().manual_seed(0)),
        "eighths": torch.ones(4, 2).to(torch.float8_e4m3fn),
    }
    save_file(first, folder / FIRST, metadata={"format": "pt"})
    save_file(second, folder / SECOND)
    weight_map = dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def sharded(tmp_path):
    return save_sharded(tmp_path)


def rewrite_header(path: Path, change) -> None:
    """Let `change` edit the parsed header; the data stays as it is."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])


def set_offsets(path: Path, name: str, offsets: list[int]) -> None:
    rewrite_header(path, lambda header: header[name].update(data_offsets=offsets))


def test_entries_give_the_bytes_that_safetensors_reads(sharded):
    index = read_index(sharded)
    assert index.names == ("codes", "eighths", "expert", "router")
    for name in index.names:
        entry = index.entry(name)
        with safe_open(sharded / entry.file, framework="pt") as file:
            expected = file.get_tensor(name)
            assert list(entry.shape) == file.get_slice(name).get_shape()
            assert entry.dtype == file.get_slice(name).get_dtype()
        stored = np.fromfile(
            sharded / entry.file, np.uint8, count=entry.n_bytes, offset=entry.offset
        )
        assert stored.tobytes() == expected.view(torch.uint8).numpy().tobytes()
    assert {index.entry(name).dtype for name in index.names} == {"BF16", "U8", "F32", "F8_E4M3"}


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": torch.zeros(3), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    index = read_index(tmp_path)
    assert "a" in index
    assert "b" not in index
    assert index.entry("empty").n_bytes == 0
    with pytest.raises(CheckpointError, match=r"holds no tensor 'b' among its 2; .* 'a', 'empty'"):
        index.entry("b")


def test_only_headers_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 34], "data_offsets": [0, 1 << 36]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    os.truncate(path, 8 + len(header) + (1 << 36))
    assert read_index(tmp_path).entry("w").n_bytes == 1 << 36


def test_an_untouched_checkpoint_is_unchanged(sharded):
    read_index(sharded).check_unchanged()


@pytest.mark.parametrize("change", ["size", "time", "header"])
def test_a_changed_file_is_named(sharded, change):
    index = read_index(sharded)
    path = sharded / SECOND
    status = path.stat()
    if change == "size":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "header":
        path.write_bytes(path.read_bytes().replace(b'"expert"', b'"EXPERT"'))
    moved = status.st_mtime_ns + (1_000 if change == "time" else 0)
    os.utime(path, ns=(status.st_atime_ns, moved))
    with pytest.raises(CheckpointError, match=f"{SECOND} has changed since .* load the checkpoint"):
        index.check_unchanged()


def test_a_removed_file_is_named(sharded):
    index = read_index(sharded)
    (sharded / FIRST).unlink()
    with pytest.raises(CheckpointError, match=f"{FIRST} was there when the checkpoint was read"):
        index.check_unchanged()


def test_a_missing_shard_is_named_with_its_folder(sharded):
    (sharded / SECOND).unlink()
    assert weight_files(sharded) == (FIRST, SECOND)
    with pytest.raises(CheckpointError, match=f"{SECOND} is missing in {sharded}, though"):
        read_index(sharded)


@pytest.mark.parametrize("n_more", [-3, 5])
def test_a_file_of_another_size_gives_both_sizes(sharded, n_more):
    path = sharded / SECOND
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + b"\0" * 5)[: size + n_more])
    text = f"{SECOND} is damaged or cut short: its header says {size} bytes, the file has "
    with pytest.raises(CheckpointError, match=text + str(size + n_more)):
        read_index(sharded)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a safetensors file, or is cut short .* the file has 0"),
        (b"\x10\0\0", "not a safetensors file, or is cut short"),
        (b"\xff" * 64, "announce a header of 18446744073709551615 bytes, the file has 64"),
        ((500).to_bytes(8, "little") + b"{}", "a header of 500 bytes, the file has 10"),
        ((3).to_bytes(8, "little") + b"{x}", "its header is no JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header is no JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*`git lfs pull`"),
    ],
)
def test_what_is_no_safetensors_file_is_told(tmp_path, content, text):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        read_index(tmp_path)


def test_overlapping_tensors_are_both_named(sharded):
    set_offsets(sharded / SECOND, "eighths", [32, 40])
    with pytest.raises(CheckpointError, match="the data of 'eighths' overlaps that of 'expert'"):
        read_index(sharded)


@pytest.mark.parametrize(
    ("offsets", "text"),
    [
        ([-8, 0], "'eighths' has data offsets -8 to 0, which are out of range"),
        ([48, 40], "'eighths' has data offsets 48 to 40, which are out of range"),
        ([40, 47], r"'eighths' of F8_E4M3 \[4, 2\] needs 8 bytes, its data offsets give 7"),
        ([4000, 4008], "its header says .* bytes, the file has"),
        ([40.0, 48.0], "expected dtype, shape and data_offsets"),
        ([40], "expected dtype, shape and data_offsets"),
    ],
)
def test_offsets_that_fit_nothing_are_given(sharded, offsets, text):
    set_offsets(sharded / SECOND, "eighths", offsets)
    with pytest.raises(CheckpointError, match=text):
        read_index(sharded)


def test_an_index_of_another_checkpoint_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["ghost"] = FIRST
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"the tensor 'ghost' in {FIRST}, which does not"):
        read_index(sharded)


def test_a_tensor_in_two_shards_is_refused_with_both(sharded):
    stray = {"router": torch.zeros(3, 4), "expert": torch.zeros(2, 5)}
    save_file(stray, sharded / SECOND)
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["eighths"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"'router' twice, in {FIRST} and in {SECOND}"):
        read_index(sharded)


def test_a_tensor_that_the_index_leaves_out_is_there_as_it_is_for_transformers(sharded):
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["eighths"]
    (sharded / INDEX).write_text(json.dumps(index))
    assert read_index(sharded).entry("eighths").file == SECOND


def test_shards_beside_the_index_are_ignored(sharded):
    save_file({"router": torch.zeros(3, 4)}, sharded / "model-00003-of-00003.safetensors")
    assert read_index(sharded).entry("router").file == FIRST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "b.safetensors"}}', "has no metadata"),
        (
            '{"metadata": {}, "weight_map": {"a": "../other.safetensors"}}',
            "files inside the checkpoint's folder",
        ),
        (
            '{"metadata": {}, "weight_map": {"a": "/other.safetensors"}}',
            "files inside the checkpoint's folder",
        ),
        (META + '"weight_map": {"a": "weights.bin"}}', r"expected \.safetensors files"),
        (META + '"weight_map": {"a": 3}}', r"expected \.safetensors files"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ((), r"holds no model\.safetensors and no model\.safetensors\.index\.json"),
        (("pytorch_model.bin",), r"pytorch_model\.bin is a pickle, which is never read.*convert"),
        (("a.pt", "b.pt"), r"a\.pt \(one of 2 such files\) is a pickle"),
        (("model.Q4_K_M.gguf",), r'is GGUF, which is not read.*expert_dtype="int4"'),
        (("consolidated.safetensors",), r"consolidated\.safetensors has another layout"),
    ],
)
def test_a_folder_without_safetensors_says_what_was_seen(tmp_path, names, text):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"(?i){text}"):
        read_index(tmp_path)
