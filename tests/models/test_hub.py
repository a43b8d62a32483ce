"""A name becomes a folder through huggingface_hub itself, talking to a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_hub import FakeHub, FakeRepo
from huggingface_hub import constants
from safetensors.numpy import save

from adapmoe_lab.assets import demo_folder
from adapmoe_lab.models.checkpoint.hub import local_folder
from adapmoe_lab.models.checkpoint.shards import read_index

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHT_MAP = {"a": FIRST, "b": SECOND}
NEEDED = {
    "config.json": b'{"model_type": "mixtral"}',
    "generation_config.json": b'{"top_k": 2}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"sentencepiece",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": WEIGHT_MAP}).encode(),
    FIRST: save({"a": np.arange(1 << 18, dtype=np.float32)}),
    SECOND: save({"b": np.arange(1 << 19, dtype=np.float32)}),
}
NEVER = {
    "README.md": b"# Model",
    "modeling_custom.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"GGUF",
    "consolidated.safetensors": b"the same weights again",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
}
REPO = "lab/moe"

SCRIPT = """
import json, shutil, sys
from adapmoe_lab.models.checkpoint.hub import local_folder
free_bytes, progress, *names = json.loads(sys.argv[1])
if free_bytes is not None:
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**9, 10**9, free_bytes)
for name, revision in names:
    try:
        print(json.dumps(["Path", str(local_folder(name, revision, progress))]))
    except Exception as error:
        print(json.dumps([[kind.__name__ for kind in type(error).__mro__], str(error)]))
"""


def run(url, home, *names, is_offline=False, free_bytes=None, progress=False):
    """Call `local_folder` for (name, revision) pairs in a process with these hub settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(is_offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    asked = json.dumps([free_bytes, progress, *names])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, asked],
        env=kept | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done


def resolve(*arguments, **settings):
    """Return what `local_folder` returned or raised for each name, as (kind, text)."""
    return [json.loads(line) for line in run(*arguments, **settings).stdout.splitlines()]


def fetched(url, home, name=REPO, revision=None, **settings) -> Path:
    [(kind, text)] = resolve(url, home, (name, revision), **settings)
    assert kind == "Path", text
    return Path(text)


def refused(answer, kind: str, *texts: str) -> None:
    kinds, text = answer
    assert kind in kinds, answer
    for part in texts:
        assert part in text


@pytest.fixture
def hub():
    with FakeHub({REPO: FakeRepo(NEEDED | NEVER, revisions=("main", "v1"))}) as hub:
        yield hub


def test_only_what_is_needed_is_downloaded_and_then_kept(hub, tmp_path):
    folder = fetched(hub.url, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == NEEDED
    assert set(hub.downloads()) == set(NEEDED)
    assert read_index(folder).names == ("a", "b")
    hub.requests.clear()
    commit = hub.repos[REPO].commit
    again = resolve(hub.url, tmp_path, (REPO, None), (REPO, "main"), (REPO, commit))
    assert again == [["Path", str(folder)]] * 3
    assert hub.requests == []
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").unlink()
    assert fetched(hub.url, tmp_path) == folder
    assert set(hub.downloads()) <= {"tokenizer.json", "tokenizer.model"}
    assert (folder / "tokenizer.json").exists()


def test_a_cut_download_goes_on_where_it_was_and_a_failed_one_keeps_whole_files(hub, tmp_path):
    large = save({"b": np.arange(6 << 20, dtype=np.float32)})
    hub.repos[REPO] = FakeRepo(NEEDED | {SECOND: large}, revisions=("main", "v1"))
    hub.broken.add(SECOND)
    [answer] = resolve(hub.url, tmp_path, (REPO, "v1"))
    refused(answer, "ConnectionError", "answered with an error (500)", "Try again later")
    hub.requests.clear()
    hub.broken.clear()
    hub.cut_once.add(SECOND)
    folder = fetched(hub.url, tmp_path, revision="v1")
    assert hub.downloads() == [SECOND, SECOND]
    whole, rest = [request.byte_range for request in hub.requests if request.method == "GET"][-2:]
    assert whole is None
    assert rest == f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"
    assert (folder / SECOND).read_bytes() == large


def test_what_the_hub_does_not_give_is_explained(hub, tmp_path):
    hub.repos["lab/gated"] = FakeRepo(NEEDED, refusal=(401, "GatedRepo"))
    hub.repos["lab/closed"] = FakeRepo(NEEDED, refusal=(403, "Forbidden"))
    hub.repos["lab/pickled"] = FakeRepo({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    lacking = {name: content for name, content in NEEDED.items() if name != SECOND}
    hub.repos["lab/lacking"] = FakeRepo(lacking)
    gated, closed, missing, revision, pickled, lacking, invalid = resolve(
        hub.url,
        tmp_path,
        ("lab/gated", None),
        ("lab/closed", None),
        ("lab/none", None),
        (REPO, "v9"),
        ("lab/pickled", None),
        ("lab/lacking", None),
        ("not an id", None),
    )
    page = f"{hub.url}/lab/gated"
    refused(
        gated, "PermissionError", f"Accept the licence on {page}", "`hf auth login`", "HF_TOKEN"
    )
    refused(closed, "PermissionError", "answered 403, so the login is not accepted", "HF_TOKEN")
    refused(missing, "FileNotFoundError", "no such model, or it is private", "`hf auth login`")
    refused(revision, "FileNotFoundError", "no revision 'v9'", f"{REPO}/commits/main")
    refused(pickled, "ValueError", "pytorch_model.bin is a pickle, which is never read", "Convert")
    refused(lacking, "ValueError", f"names {SECOND}, which the model does not have")
    refused(invalid, "FileNotFoundError", "'not an id' is neither an existing folder nor a hub id")
    assert "pytorch_model.bin" not in hub.downloads()


def test_a_full_disk_is_noticed_before_the_weights_come(hub, tmp_path):
    [answer] = resolve(hub.url, tmp_path, (REPO, None), free_bytes=1 << 20)
    place = f"{tmp_path}/hub has 1 MiB free; free 2 MiB, or set HF_HOME or HF_HUB_CACHE"
    refused(answer, "NotEnoughDiskError", f"'{REPO}' needs 3 MiB more", place)
    refused(answer, "OSError")
    assert not {FIRST, SECOND} & set(hub.downloads())
    just_enough = len(NEEDED[FIRST]) + len(NEEDED[SECOND])
    fetched(hub.url, tmp_path, free_bytes=just_enough)


def test_without_a_connection_the_cache_is_used_or_said_to_lack_what(hub, tmp_path):
    folder = fetched(hub.url, tmp_path)
    url = hub.url
    for name in (SECOND, "tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()
    [forbidden, other] = resolve(url, tmp_path, (REPO, None), ("lab/other", None), is_offline=True)
    lacks = f"the cache folder {folder} lacks a tokenizer, {SECOND}. Connect"
    refused(forbidden, "FileNotFoundError", "HF_HUB_OFFLINE=1", lacks)
    refused(other, "FileNotFoundError", f"{tmp_path}/hub holds no config.json of it", "or 'demo'")


def test_a_hub_that_is_gone_is_named(tmp_path):
    with FakeHub({REPO: FakeRepo(NEEDED)}) as hub:
        folder = fetched(hub.url, tmp_path)
    [kept, other] = resolve(hub.url, tmp_path, (REPO, None), ("lab/other", None))
    assert kept == ["Path", str(folder)]
    refused(other, "FileNotFoundError", f"{hub.url} cannot be reached (ConnectError", "holds no")


def test_bars_are_drawn_on_request(hub, tmp_path):
    bars = [
        "%|" in run(hub.url, tmp_path / str(progress), (REPO, None), progress=progress).stderr
        for progress in (True, False)
    ]
    assert bars == [True, False]


def test_the_demo_and_folders_are_returned_as_they_are(tmp_path, monkeypatch):
    assert local_folder("demo") == demo_folder()
    (tmp_path / "config.json").write_text("{}")
    assert local_folder(tmp_path) == local_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~") == tmp_path
    with pytest.raises(ValueError, match="revision='main' chooses a version of a hub model"):
        local_folder("demo", revision="main")


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/c", Path("model")])
def test_a_folder_that_is_not_there_is_told(name):
    with pytest.raises(FileNotFoundError, match=f"No model folder at {name};"):
        local_folder(name)


def test_a_folder_without_a_config_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        local_folder(tmp_path)


def test_a_gguf_file_is_refused_by_name(tmp_path):
    path = tmp_path / "mixtral.Q4_K_M.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r'Q4_K_M\.gguf is a GGUF file.*expert_dtype="int4"'):
        local_folder(path)
