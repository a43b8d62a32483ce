"""From what the user names to a folder on this machine: the demo, a folder, or a hub model.

Everything that goes over the network goes through huggingface_hub, so its settings (`HF_HOME`,
`HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_ENDPOINT`) hold here too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import tqdm, validate_repo_id

from adapmoe_lab.assets import demo_folder
from adapmoe_lab.models.checkpoint.hub_errors import HUB_ERRORS, explained
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.checkpoint.shards import (
    INDEX_NAME,
    SINGLE_NAME,
    no_safetensors,
    weight_files,
)

MIB = 2**20
LISTING_TIMEOUT_S = 10.0

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "tiktoken.model")
"""What is downloaded beside the weights, from the top of a repository only."""

N_FILES_AT_ONCE = 4
"""Files under way together: huggingface_hub starts a file that was interrupted anew."""


class NotEnoughDiskError(OSError):
    """The cache folder's disk has no room for the rest of a model."""


class _NoBar(tqdm):
    """A progress bar that is never drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def local_folder(name: str | Path, revision: str | None = None, progress: bool = True) -> Path:
    """Return the folder of a model, downloading what is missing of a hub model.

    A hub model that is completely cached is used without any request.

    Args:
        name: `"demo"`, a folder, or a hub id.
        revision: branch, tag or commit of a hub model; None for its main branch.
        progress: whether a download draws bars.

    Raises:
        FileNotFoundError: no such folder, hub model or revision; or the hub cannot be reached
            and the model is not completely cached.
        PermissionError: the model is gated, or the login is not accepted.
        ConnectionError: the hub answers with an error of its own.
        NotEnoughDiskError: the disk has no room for what is missing.
        ValueError: the model is not stored as safetensors, or a folder is given a revision.
    """
    folder = _folder_named(name, revision)
    return folder if folder is not None else _hub_folder(_hub_id(name), revision, progress)


def config_folder(name: str | Path, revision: str | None = None) -> Path:
    """Return a folder with a model's configuration; of a hub model only small files are fetched.

    Raises: as `local_folder`.
    """
    folder = _folder_named(name, revision)
    if folder is not None:
        return folder
    repo = _hub_id(name)
    cached = _cached_folder(repo, revision)
    if cached is not None:
        return cached
    try:
        return _download_small_files(repo, revision, _NoBar)
    except HUB_ERRORS as error:
        raise explained(error, repo, revision, _in_cache(repo, revision)) from error


def _folder_named(name: str | Path, revision: str | None) -> Path | None:
    """Return the folder a name stands for; None if it can only be a hub id."""
    path = demo_folder() if name == "demo" else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(
                f"{path} holds no config.json, so it is not a model folder; give the folder that "
                "save_pretrained wrote, a hub id such as 'mistralai/Mixtral-8x7B-v0.1', or 'demo'."
            )
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} chooses a version of a hub model, and {name!r} is a "
                "folder; leave it out."
            )
        return path
    if path.suffix == ".gguf":
        raise ValueError(
            f"{name} is a GGUF file, which is not read; use the original safetensors checkpoint "
            'and quantise it with expert_dtype="int4".'
        )
    is_path = isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path or path.is_file():
        raise FileNotFoundError(
            f"No model folder at {name}; give an existing folder, a hub id, or 'demo'."
        )
    return None


def _hub_id(name: str | Path) -> str:
    repo = str(name)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{repo!r} is neither an existing folder nor a hub id such as "
            "'mistralai/Mixtral-8x7B-v0.1'; give one of these, or 'demo'."
        ) from error
    return repo


def _hub_folder(repo: str, revision: str | None, progress: bool) -> Path:
    cached = _cached_folder(repo, revision)
    if cached is not None and not _missing(cached):
        return cached
    try:
        return _download(repo, revision, progress)
    except HUB_ERRORS as error:
        raise explained(error, repo, revision, _in_cache(repo, revision)) from error


def _cached_folder(repo: str, revision: str | None) -> Path | None:
    """Return where the cache keeps a model at a revision, complete or not."""
    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _missing(folder: Path) -> tuple[str, ...]:
    """Return the names of files that a cached model cannot do without and that are not there.

    Weights are downloaded last, so where they all are, the smaller files are too, unless another
    program cached the model without its tokenizer.
    """
    missing = tuple(name for name in weight_files(folder) if not (folder / name).exists())
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    return missing if has_tokenizer else ("a tokenizer", *missing)


def _in_cache(repo: str, revision: str | None) -> str:
    """Say what the cache holds of a model that is not complete."""
    folder = _cached_folder(repo, revision)
    if folder is None:
        return f"the cache folder {constants.HF_HUB_CACHE} holds no config.json of it"
    missing = _missing(folder)
    more = f" and {len(missing) - 3} more files" if len(missing) > 3 else ""
    return f"the cache folder {folder} lacks {', '.join(missing[:3])}{more}"


def _download(repo: str, revision: str | None, progress: bool) -> Path:
    """Download what is missing of a model, its weights last.

    Raises:
        CheckpointError: the model has no safetensors weights, or not those its index names.
        NotEnoughDiskError: there is no room for the weights.
    """
    listing = HfApi().model_info(repo, revision=revision, timeout=LISTING_TIMEOUT_S)
    names = {file.rfilename for file in listing.siblings or ()}
    if names.isdisjoint((INDEX_NAME, SINGLE_NAME)):
        raise CheckpointError(no_safetensors(f"The hub model {repo!r}", names))
    bar = None if progress else _NoBar
    folder = _download_small_files(repo, revision, bar)
    weights = list(weight_files(folder, names))
    absent = sorted(set(weights) - names)
    if absent:
        raise CheckpointError(
            f"The index of the hub model {repo!r} names {absent[0]}, which the model does not "
            "have; choose another revision, or tell its author."
        )
    commit = folder.name
    plan = snapshot_download(
        repo, revision=commit, allow_patterns=weights, dry_run=True, tqdm_class=_NoBar
    )
    _check_disk(repo, sum(file.file_size or 0 for file in plan if file.will_download))
    snapshot_download(
        repo,
        revision=commit,
        allow_patterns=weights,
        max_workers=N_FILES_AT_ONCE,
        tqdm_class=bar,
    )
    return folder


def _download_small_files(repo: str, revision: str | None, bar: type[tqdm] | None) -> Path:
    """Download everything but the weights."""
    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(SMALL_FILES),
            ignore_patterns="*/*",
            tqdm_class=bar,
        )
    )


def _check_disk(repo: str, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(constants.HF_HUB_CACHE).free
    if needed_bytes > free_bytes:
        raise NotEnoughDiskError(
            f"{repo!r} needs {needed_bytes / MIB:,.0f} MiB more, and the disk of the cache folder "
            f"{constants.HF_HUB_CACHE} has {free_bytes / MIB:,.0f} MiB free; free "
            f"{(needed_bytes - free_bytes) / MIB:,.0f} MiB, or set HF_HOME or HF_HUB_CACHE to a "
            "folder on a larger disk."
        )
