"""A Hugging Face hub on this machine: what huggingface_hub asks of one, and what was asked."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass
class FakeRepo:
    """A model repository.

    Attributes:
        files: contents by path.
        revisions: names of its branches and tags, all at the same commit.
        refusal: status and error code that answer for its files, though not for their names.
    """

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    refusal: tuple[int, str] | None = None

    @cached_property
    def etags(self) -> dict[str, str]:
        """SHA-256 of large files and git blob ids of small ones, as the hub has them."""
        return {path: _etag(path, content) for path, content in self.files.items()}

    @cached_property
    def commit(self) -> str:
        """The commit that every revision names, 40 hex digits."""
        return hashlib.sha1(repr(self.etags).encode()).hexdigest()  # noqa: S324

    def listing(self) -> list[dict[str, object]]:
        """Return the files as the hub's tree lists them."""
        rows: list[dict[str, object]] = []
        for path, etag in self.etags.items():
            size = len(self.files[path])
            row = {"type": "file", "path": path, "size": size, "oid": etag}
            is_large = path.endswith(LFS_SUFFIXES)
            lfs = {"oid": etag, "size": size, "pointerSize": 130}
            rows.append(row | ({"lfs": lfs} if is_large else {}))
        return rows


@dataclass(frozen=True)
class Request:
    """What the client asked for; `byte_range` is None when it asked for a whole file."""

    method: str
    path: str
    byte_range: str | None


@dataclass
class FakeHub:
    """Serves repositories on 127.0.0.1 while its `with` block lasts.

    Attributes:
        repos: repositories by hub id.
        cut_once: files whose first download ends half way.
        broken: files whose download is answered with an error.
        requests: all requests so far.
    """

    repos: dict[str, FakeRepo]
    cut_once: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloads(self) -> list[str]:
        """Return the names of the files whose content was asked for, in order."""
        paths = [request.path for request in self.requests if request.method == "GET"]
        return [path.rsplit("/", 1)[1] for path in paths if not path.startswith("/api/")]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Stay silent: requests are kept in `FakeHub.requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        kind = parts.pop(0) if parts[0] in ("api", "cdn") else "resolve"
        if kind == "api":
            parts.pop(0)
        repo = self.hub.repos.get("/".join(parts[:2]))
        revision = parts[3] if len(parts) > 3 else "main"
        if repo is None:
            self._refuse(401, "RepoNotFound")
        elif revision not in (*repo.revisions, repo.commit):
            self._refuse(404, "RevisionNotFound")
        elif kind == "api":
            self._list(repo, "/".join(parts[:2]), in_full=parts[2:3] == ["tree"])
        elif repo.refusal:
            self._refuse(*repo.refusal)
        elif "/".join(parts[4:]) not in repo.files:
            self._refuse(404, "EntryNotFound")
        else:
            self._serve(repo, "/".join(parts[4:]), from_cdn=kind == "cdn")

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code})

    def _list(self, repo: FakeRepo, repo_id: str, in_full: bool) -> None:
        if in_full:
            listing: object = repo.listing()
        else:
            siblings = [{"rfilename": path} for path in repo.files]
            listing = {"id": repo_id, "sha": repo.commit, "siblings": siblings}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _serve(self, repo: FakeRepo, path: str, from_cdn: bool) -> None:
        content = repo.files[path]
        about = {"ETag": f'"{repo.etags[path]}"', "X-Repo-Commit": repo.commit}
        if path.endswith(LFS_SUFFIXES) and not from_cdn:
            about["Location"] = f"{self.hub.url}/cdn{self.path}"
            about |= {"X-Linked-ETag": about["ETag"], "X-Linked-Size": str(len(content))}
            self._send(302, about)
        elif path in self.hub.broken and self.command == "GET":
            self._send(500, {})
        elif asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            about["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, about, content[start:])
        elif path in self.hub.cut_once and self.command == "GET":
            self.hub.cut_once.remove(path)
            self._send(200, about, content, n_sent=len(content) // 2)
            self.close_connection = True
        else:
            self._send(200, about, content)

    def _send(
        self, status: int, about: dict[str, str], content: bytes = b"", n_sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**about, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:n_sent])


def _etag(path: str, content: bytes) -> str:
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324
