"""Experts that stay on disk: exact under any budget, and damage to the files is noticed."""

import os
import shutil

import psutil
import pytest
import torch
from checkpoints import save_tiny_mixtral
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.store.expert_store import DiskStore
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.records.files import CACHE_VARIABLE

IDS = torch.arange(1, 60)[None]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return save_tiny_mixtral(tmp_path / "model")


def load_on_disk(folder, **arguments):
    """Load with host memory for half the experts, all of it slots unless told otherwise."""
    options = {"host_memory": "60%", "dtype": "float32", "device": "cpu", "link": "none"}
    model = load(folder, **{**options, **arguments})
    assert isinstance(model.store, DiskStore)
    return model


@pytest.mark.parametrize("expert_memory", [None, "42%", "50%"])
@torch.no_grad()
def test_it_equals_the_model_in_memory(folder, expert_memory):
    expected = load(folder, dtype="float32", device="cpu", link="none").hf(IDS).logits
    model = load_on_disk(folder, expert_memory=expert_memory)
    assert torch.equal(model.hf(IDS).logits, expected)
    assert model.generate("Hello", 12) == load(folder, dtype="float32", link="none").generate(
        "Hello", 12
    )


def test_rows_are_kept_within_the_budget(folder):
    model = load_on_disk(folder, host_memory="84%", expert_memory="42%")
    reads, write = [], model.store._write
    model.store._write = lambda *args: (reads.append(args[:2]), write(*args))
    for _ in range(3):
        model.store.buffer(0, 1)
    assert reads == [(0, 1)]
    for expert in range(4):
        for layer in range(3):
            model.store.buffer(layer, expert)
    assert len(reads) == 12  # the first was still there
    model.store.buffer(0, 1)
    assert len(reads) == 13  # and has left since
    assert model.store._used_bytes <= model.store._cache_bytes


def flip_a_bit(folder, layer, expert):
    """Change one bit of an expert in the file, leaving size and time as they were."""
    path = folder / "model.safetensors"
    before = path.stat()
    with safe_open(path, "pt") as file:
        names = [n for n in file.keys() if f"layers.{layer}." in n and f".{expert}.w1" in n]  # noqa: SIM118
        (name,) = names
        needle = file.get_tensor(name).numpy().tobytes()
    content = bytearray(path.read_bytes())
    at = content.index(needle) + len(needle) // 2
    content[at] ^= 0x10
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@torch.no_grad()
def test_a_flipped_bit_is_noticed_by_a_later_run(folder):
    load_on_disk(folder).hf(IDS)
    flip_a_bit(folder, layer=1, expert=2)
    model = load_on_disk(folder)
    expected = (
        r"Expert 2 of MoE layer 1 in .* its file changed or is damaged\. Restore the file; if"
    )
    with pytest.raises(CheckpointError, match=expected):
        model.hf(IDS)


@torch.no_grad()
def test_weights_written_anew_in_place_are_read(folder):
    load_on_disk(folder).hf(IDS)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, path, {"format": "pt"})
    os.utime(path, ns=(1, 1))
    expected = load(folder, dtype="float32", device="cpu", link="none").hf(IDS).logits
    assert torch.equal(load_on_disk(folder).hf(IDS).logits, expected)


@torch.no_grad()
def test_another_layout_has_a_manifest_of_its_own(folder):
    load_on_disk(folder).hf(IDS)
    load_on_disk(folder, expert_dtype="bfloat16").hf(IDS)


@torch.no_grad()
def test_a_copy_elsewhere_has_a_manifest_of_its_own(folder, tmp_path):
    load_on_disk(folder).hf(IDS)
    shutil.copytree(folder, tmp_path / "copy")
    flip_a_bit(tmp_path / "copy", layer=1, expert=2)
    load_on_disk(tmp_path / "copy").hf(IDS)


@torch.no_grad()
def test_a_file_cut_short_while_in_use_is_noticed(folder):
    model = load_on_disk(folder)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="was cut short while in use; restore it"):
        model.hf(IDS)


def test_what_does_not_fit_says_what_does(folder):
    with pytest.raises(MemoryError, match=r"does not fit cpu: .* of expert slots.*give expert_mem"):
        load(folder, expert_memory="90%", host_memory="60%", device="cpu", link="none")
    with pytest.raises(ValueError, match=r"0 slots cannot give 3 layers 1 each; raise the budget"):
        load(folder, host_memory="10%", device="cpu", link="none")


@torch.no_grad()
def test_packed_experts_are_recorded_apart_by_what_they_were_packed_from(folder):
    load_on_disk(folder, expert_dtype="int4", host_memory="55%").hf(IDS)
    load_on_disk(folder, expert_dtype="int4", host_memory="55%", dtype="bfloat16").hf(IDS)


def test_detaching_closes_the_files(folder):
    model = load_on_disk(folder)
    model.hf(IDS)
    model.detach()
    opened = [file.path for file in psutil.Process().open_files()]
    assert not [path for path in opened if path.endswith(".safetensors")]
