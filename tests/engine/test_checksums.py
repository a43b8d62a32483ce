"""Checksum manifests: what one process records, every other one knows."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from adapmoe_lab.engine.store.checksums import checksum, kept_manifest
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.records.files import CACHE_VARIABLE

N_AT_ONCE = 8


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path / "checksums"


def test_what_many_record_at_once_is_all_kept(cache):
    """Each opens the manifest at the same moment, when there is none yet."""
    rows = [torch.full((16,), number, dtype=torch.uint8) for number in range(N_AT_ONCE)]
    together = Barrier(N_AT_ONCE)

    def record(name, expert):
        together.wait()
        kept_manifest(name, (1, N_AT_ONCE), "a model").check(0, expert, rows[expert])

    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        for attempt in range(20):
            list(pool.map(record, [f"{attempt}"] * N_AT_ONCE, range(N_AT_ONCE)))
    kept = [np.load(path) for path in cache.iterdir()]
    assert len(kept) == 20
    assert all(known.tolist() == [[checksum(row) for row in rows]] for known in kept)


def test_another_process_knows_what_was_recorded(cache):
    kept_manifest("one", (1, 1), "a model").check(0, 0, torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="in a model has the checksum"):
        kept_manifest("one", (1, 1), "a model").check(0, 0, torch.ones(4, dtype=torch.uint8))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array at all"])
def test_a_damaged_manifest_says_what_to_delete(cache, content):
    kept_manifest("one", (1, 1), "a model")
    (cache / "one.npy").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"one\.npy, which keeps .* is damaged .*; delete it"):
        kept_manifest("one", (1, 1), "a model")


def test_a_file_system_without_hard_links_has_manifests_too(cache, monkeypatch):
    def unsupported(*_):
        raise PermissionError

    monkeypatch.setattr("os.link", unsupported)
    kept_manifest("one", (1, 1), "a model").check(0, 0, torch.zeros(4, dtype=torch.uint8))
    assert [path.name for path in cache.iterdir()] == ["one.npy"]


def test_a_cache_folder_that_cannot_be_made_costs_the_memory_of_other_runs_only(
    tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    manifest = kept_manifest("one", (1, 2), "a model")
    manifest.check(0, 0, torch.zeros(4, dtype=torch.uint8))
    manifest.check(0, 1, torch.ones(4, dtype=torch.uint8))


def test_a_manifest_that_cannot_be_written_still_tells_what_changed(cache, monkeypatch):
    zeros, ones = torch.zeros(4, dtype=torch.uint8), torch.ones(4, dtype=torch.uint8)
    kept_manifest("one", (1, 2), "a model").check(0, 0, zeros)
    before = (cache / "one.npy").read_bytes()
    monkeypatch.setattr("os.access", lambda *_: False)
    manifest = kept_manifest("one", (1, 2), "a model")
    manifest.check(0, 1, ones)
    with pytest.raises(CheckpointError, match="Expert 0 of MoE layer 0 in a model has the check"):
        manifest.check(0, 0, ones)
    assert (cache / "one.npy").read_bytes() == before
