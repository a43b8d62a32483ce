"""All-or-nothing output: a folder or file is written aside and put in place when it is complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder whose files move into `target` when the context ends without error.

    Files of the same name are replaced, one rename each; weights of an earlier checkpoint that the
    new one does not have are removed, everything else in `target` stays.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; name a folder to write to.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as name:
        staged = Path(name)
        yield staged
        target.mkdir(exist_ok=True)
        new = {path.name for path in staged.iterdir()}
        if any(name.endswith(".safetensors") for name in new):
            for stale in target.glob("model*.safetensors*"):
                if stale.name not in new:
                    stale.unlink()
        for name in sorted(new):
            os.chmod(staged / name, 0o644)
            os.replace(staged / name, target / name)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write UTF-8 lines through a temporary file beside `path`, renamed when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{line}\n" for line in lines)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
