"""Prepared stores: written whole or not at all, reopened as they were, else refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_tiny_mixtral
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.store import builder as opening
from adapmoe_lab.engine.store.index import BLOB, INDEX
from adapmoe_lab.engine.store.on_disk import PreparedStore, save_store
from adapmoe_lab.models.checkpoint.checkpoint import Checkpoint
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError

IDS = torch.arange(1, 60)[None]
MIXED = [["float32", "int8", "int4", "mxfp4"]] * 3


@pytest.fixture
def prepared(tiny_checkpoint, tmp_path):
    load_with(tiny_checkpoint, tmp_path / "experts", expert_dtype="int4")
    return tmp_path / "experts"


def load_with(checkpoint, store, **arguments):
    options = {"dtype": "float32", "device": "cpu", "link": "none", "announce": lambda _: None}
    return load(checkpoint, store=store, **{**options, **arguments})


@pytest.mark.parametrize("expert_dtype", ["float32", "int4", MIXED], ids=["plain", "int4", "mixed"])
@torch.no_grad()
def test_it_reopens_as_it_was(tiny_checkpoint, tmp_path, expert_dtype):
    expected = load_with(tiny_checkpoint, None, expert_dtype=expert_dtype)
    load_with(tiny_checkpoint, tmp_path / "experts", expert_dtype=expert_dtype)
    reopened = load_with(tiny_checkpoint, tmp_path / "experts", expert_memory="80%")
    assert isinstance(reopened.store, PreparedStore)
    assert reopened.spec.expert_bytes == expected.spec.expert_bytes
    assert reopened.spec.dtype == expected.spec.dtype
    assert torch.equal(reopened.hf(IDS).logits, expected.hf(IDS).logits)


@torch.no_grad()
def test_a_loaded_model_can_save_its_experts(tiny_checkpoint, tmp_path):
    model = load_with(tiny_checkpoint, None, expert_dtype="int8")
    model.save_experts(tmp_path / "experts")
    reopened = load_with(tiny_checkpoint, tmp_path / "experts")
    assert torch.equal(reopened.hf(IDS).logits, model.hf(IDS).logits)
    with pytest.raises(FileExistsError, match="never overwritten, name another"):
        model.save_experts(tmp_path / "experts")


def test_rows_lie_in_order_and_aligned(prepared):
    index = json.loads((prepared / INDEX).read_text())
    offsets = [expert["offset"] for layer in index["experts"] for expert in layer]
    assert offsets == sorted(offsets)
    assert all(offset % 256 == 0 for offset in offsets)


def test_another_model_is_refused(prepared, tmp_path):
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="was prepared from other weights"):
        load_with(other, prepared)


def test_other_experts_between_the_same_routers_are_refused(tiny_checkpoint, prepared, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "finetuned")
    file = tmp_path / "finetuned" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if ".experts.3." in name)
    tensors[name] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="was prepared from other weights"):
        load_with(tmp_path / "finetuned", prepared)


def test_another_precision_is_refused(tiny_checkpoint, prepared):
    expected = (
        "holds experts as int4, asked for were int8; give its precision as expert_dtype, or name a "
        r"new folder \(12 experts differ\)"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_with(tiny_checkpoint, prepared, expert_dtype="int8")


@pytest.mark.parametrize("version", [1, 99])
def test_another_version_is_refused(tiny_checkpoint, prepared, version):
    index = json.loads((prepared / INDEX).read_text())
    (prepared / INDEX).write_text(json.dumps({**index, "schema_version": version}))
    with pytest.raises(CheckpointError, match=f"version {version}, this adapmoe-lab reads 2"):
        load_with(tiny_checkpoint, prepared)


def test_a_blob_cut_short_is_refused(tiny_checkpoint, prepared):
    with (prepared / BLOB).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="has 1000 bytes, its index says"):
        load_with(tiny_checkpoint, prepared)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_index_is_refused(tiny_checkpoint, prepared, content):
    (prepared / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"experts\.json is damaged"):
        load_with(tiny_checkpoint, prepared)


@torch.no_grad()
def test_a_flipped_bit_is_noticed(tiny_checkpoint, prepared):
    blob = bytearray((prepared / BLOB).read_bytes())
    blob[len(blob) // 2] ^= 1
    (prepared / BLOB).write_bytes(blob)
    model = load_with(tiny_checkpoint, prepared)
    with pytest.raises(CheckpointError, match="its file changed or is damaged"):
        model.hf(IDS)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_biases_are_not_read_as_another_type(tmp_path):
    checkpoint, store = save_tiny("gpt_oss", tmp_path / "model"), tmp_path / "experts"
    load_with(checkpoint, store, dtype="bfloat16", expert_dtype="int8")
    with pytest.raises(
        CheckpointError,
        match=r"biases as bfloat16, asked for were float16; load with dtype='bfloat16', or name a",
    ):
        load_with(checkpoint, store, dtype="float16", expert_dtype="int8")
    load_with(checkpoint, store, dtype="bfloat16")
    edit_index(store, lambda index: index.pop("plain"))
    with pytest.raises(
        CheckpointError, match=r"does not say whether its biases are .* prepare the store again"
    ):
        load_with(checkpoint, store, dtype="bfloat16")


def test_biases_in_float32_are_known_by_their_size(tmp_path):
    checkpoint, store = save_tiny("gpt_oss", tmp_path / "model"), tmp_path / "experts"
    load_with(checkpoint, store, dtype="float32", expert_dtype="int8")
    edit_index(store, lambda index: index.pop("plain"))
    load_with(checkpoint, store, dtype="float32")
    with pytest.raises(CheckpointError, match="they lie in other bytes"):
        load_with(checkpoint, store, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_matrices_alone_are_computed_with_in_any_precision(tiny_checkpoint, prepared, dtype):
    edit_index(prepared, lambda index: index.pop("plain"))
    assert load_with(tiny_checkpoint, prepared, dtype=dtype).spec.dtype == "int4"


def test_a_missing_blob_is_told(tiny_checkpoint, prepared):
    (prepared / BLOB).unlink()
    with pytest.raises(CheckpointError, match=r"experts\.bin, which holds .* is missing; restore"):
        load_with(tiny_checkpoint, prepared)


def test_a_checkpoint_written_meanwhile_leaves_no_store(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    save = opening.save_store

    def touching(*arguments):
        os.utime(checkpoint / "model.safetensors", ns=(1, 1))
        save(*arguments)

    monkeypatch.setattr(opening, "save_store", touching)
    with pytest.raises(CheckpointError, match="has changed since the checkpoint was read"):
        load_with(checkpoint, tmp_path / "experts")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_in_the_way_is_told_before_a_model_is_looked_for(tmp_path):
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="never overwritten, name another"):
            load_with("nobody/no-such-model", taken)


@pytest.fixture
def no_weights(monkeypatch):
    """Let reading any weight, beside the headers of the files, be an error."""

    def read(_):
        pytest.fail("weights are read")

    monkeypatch.setattr(Checkpoint, "identity", read)
    monkeypatch.setattr(Checkpoint, "load_skeleton", read)


def test_a_full_disk_is_told_before_weights_are_read(
    tiny_checkpoint, tmp_path, monkeypatch, no_weights
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"The store takes 0\.00 GiB, .* on a larger disk"):
        load_with(tiny_checkpoint, tmp_path / "new" / "experts")


def test_a_place_without_files_is_told_before_weights_are_read(
    tiny_checkpoint, tmp_path, no_weights
):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is no folder"):
        load_with(tiny_checkpoint, tmp_path / "file" / "experts")


def test_another_layout_is_told_before_weights_are_read(tiny_checkpoint, prepared, no_weights):
    with pytest.raises(CheckpointError, match="holds experts as int4, asked for were int8"):
        load_with(tiny_checkpoint, prepared, expert_dtype="int8")


def test_the_index_is_read_once(tiny_checkpoint, prepared, monkeypatch):
    read, read_text = [], Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a, **b: read.append(path.name) or read_text(path, *a, **b)
    )
    load_with(tiny_checkpoint, prepared)
    assert read.count(INDEX) == 1


def test_an_interrupt_leaves_nothing_behind(tiny_checkpoint, tmp_path, monkeypatch):
    model = load_with(tiny_checkpoint, None)
    row, left = model.store.buffer, 5

    def interrupted(layer, expert):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return row(layer, expert)

    monkeypatch.setattr(model.store, "buffer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_experts(tmp_path / "experts")
    assert list(tmp_path.iterdir()) == []


def meanwhile(monkeypatch, other_load):
    """Let another load write the store after this one has found none and before it writes."""
    save = opening.save_store

    def late(*arguments):
        monkeypatch.setattr(opening, "save_store", save)
        other_load()
        save(*arguments)

    monkeypatch.setattr(opening, "save_store", late)


@torch.no_grad()
def test_what_another_load_prepared_meanwhile_is_opened(tiny_checkpoint, tmp_path, monkeypatch):
    def load_it():
        return load_with(tiny_checkpoint, tmp_path / "experts", expert_dtype="int4")

    meanwhile(monkeypatch, load_it)
    assert torch.equal(load_it().hf(IDS).logits, load_it().hf(IDS).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]


def test_what_another_model_prepared_meanwhile_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    meanwhile(monkeypatch, lambda: load_with(other, tmp_path / "experts"))
    with pytest.raises(CheckpointError, match="was prepared from other weights"):
        load_with(tiny_checkpoint, tmp_path / "experts")


def test_of_two_saves_at_once_the_first_to_end_stays(tiny_checkpoint, tmp_path):
    store, folder = load_with(tiny_checkpoint, None).store, tmp_path / "experts"

    def save_another(_):
        if not folder.exists():
            save_store(store, folder, "first")

    with pytest.raises(FileExistsError, match="never overwritten, name another"):
        save_store(store, folder, "second", save_another)
    assert json.loads((folder / INDEX).read_text())["identity"] == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]


AT_ONCE = """
import sys, torch
from adapmoe_lab.engine.loading import load
print("ready", flush=True)
sys.stdin.readline()
model = load(sys.argv[1], dtype="float32", expert_dtype="int4", device="cpu", link="none",
             store=sys.argv[2], announce=lambda _: None)
print(model.hf(torch.arange(1, 60)[None]).logits.sum().item())
"""


def test_two_processes_prepare_one_store_at_once(tmp_path):
    checkpoint = save_tiny_mixtral(tmp_path / "model", n_layers=6, n_experts=16)
    command = [sys.executable, "-c", AT_ONCE, checkpoint, tmp_path / "stores" / "experts"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    sums = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sums[0] == sums[1]
    assert [path.name for path in (tmp_path / "stores").iterdir()] == ["experts"]


SERVER = """
import os, sys, time, torch
torch.set_num_threads(1)
from adapmoe_lab.engine.loading import load
def load_with(store):
    return load(sys.argv[1], dtype="float32", device="cpu", link="none", store=store,
                announce=lambda _: None)
model = load_with(None)
print("ready", flush=True)
for line in sys.stdin:
    way, folder = line.split()
    child = os.fork()
    if child == 0:
        model.save_experts(folder) if way == "save" else load_with(folder)
        os._exit(0)
    print(child, flush=True)
    start = time.perf_counter()
    os.waitpid(child, 0)
    print(time.perf_counter() - start, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to start many processes quickly")
@torch.no_grad()
def test_killed_loads_and_saves_never_leave_a_wrong_store(tmp_path):
    """SIGKILL at sixty moments spread over the time that saving, or loading and saving, takes."""
    checkpoint = save_tiny_mixtral(tmp_path / "model", n_layers=6, n_experts=16)
    expected = load_with(checkpoint, None).hf(IDS).logits
    command = [sys.executable, "-c", SERVER, str(checkpoint)]
    n_whole = n_killed = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as server:
        assert server.stdout.readline() == "ready\n"
        took = {way: write_in(server, way, tmp_path / way, None) for way in ("save", "load")}
        for number in range(60):
            way, folder = ("save", "load")[number % 2], tmp_path / f"store{number}"
            write_in(server, way, folder, kill_after_s=1.1 * took[way] * number / 60)
            if not folder.exists():
                n_killed += 1
                continue
            n_whole += 1
            assert torch.equal(load_with(checkpoint, folder).hf(IDS).logits, expected)
        server.stdin.close()
    assert min(n_whole, n_killed) > 0, "the kills missed the moments that matter"
    left = next(path for path in tmp_path.glob(".store*.*"))
    folder = tmp_path / left.name.partition(".partial-")[0].removeprefix(".")
    load_with(checkpoint, None).save_experts(folder)
    assert not list(tmp_path.glob(f".{folder.name}.*")), "what a killed save left was not removed"


def write_in(server, way, folder, kill_after_s):
    """Let a child of the server write a store, kill it meanwhile; return the seconds it lived."""
    server.stdin.write(f"{way} {folder}\n")
    child = int(server.stdout.readline())
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        with suppress(ProcessLookupError):  # it may have ended just before
            os.kill(child, signal.SIGKILL)
    return float(server.stdout.readline())
