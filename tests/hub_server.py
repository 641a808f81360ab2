"""A small hub on 127.0.0.1, for the real `huggingface_hub` client: it serves folders as models and datasets.

    with HubServer(models={"org/name": folder}, datasets={"org/data": folder}) as hub:
        use_hub(monkeypatch, hub, cache)            # the client in this process
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})  # or one in another process

It speaks what the client asks: a repository's revision, its tree, and its files with HEAD, GET and ranges.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<rest>.+))?")
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class HubServer:
    """The running server; `requests` lists the method and path of everything that was asked of it.

    `gated` names repositories that refuse their files to everybody.
    """

    def __init__(
        self,
        models: Mapping[str, Path] | None = None,
        datasets: Mapping[str, Path] | None = None,
        gated: frozenset[str] = frozenset(),
    ) -> None:
        self.repositories = {"models": dict(models or {}), "datasets": dict(datasets or {})}
        self.gated = gated
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment variables that make a fresh process use this hub and keep its files in `cache`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering; the port is closed."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: HubServer, cache: Path) -> None:
    """Point this process's hub client at `hub`; the client read its environment when it was imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def commit_of(folder: Path) -> str:
    """A commit hash of 40 digits that follows from the folder's files."""
    digest = hashlib.sha1()
    for path in _files(folder):
        digest.update(path.encode() + (folder / path).read_bytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed; `hub.requests` has it all."""

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := API.fullmatch(path):
            self._api(match["kind"], match["id"], match["what"], match["rest"])
        elif match := RESOLVE.fullmatch(path):
            self._file("datasets" if match["kind"] else "models", match["id"], match["path"], with_body)
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def _api(self, kind: str, repository: str, what: str | None, rest: str | None) -> None:
        folder = self.hub.repositories[kind].get(repository)
        if folder is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
            return
        if what == "tree":
            content: Any = [_tree_entry(folder, path) for path in _files(folder)]
        else:
            content = {"id": repository, "sha": commit_of(folder), "private": False, "tags": [], "downloads": 0}
            content["siblings"] = [{"rfilename": path} for path in _files(folder)]
        self._send(HTTPStatus.OK, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, kind: str, repository: str, path: str, with_body: bool) -> None:
        folder = self.hub.repositories[kind].get(repository)
        if folder is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        elif repository in self.hub.gated:
            self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        elif path not in _files(folder):
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", {"X-Repo-Commit": commit_of(folder)})
        else:
            self._send_file(folder, path, with_body)

    def _send_file(self, folder: Path, path: str, with_body: bool) -> None:
        data = (folder / path).read_bytes()
        headers = {
            "X-Repo-Commit": commit_of(folder),
            "ETag": f'"{_etag(data)}"',
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        status = HTTPStatus.OK
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = HTTPStatus.PARTIAL_CONTENT, data[first : last + 1]
        self._send(status, data, headers, with_body)

    def _refuse(self, status: HTTPStatus, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"", {**(headers or {}), **({"X-Error-Code": code} if code else {})})

    def _send(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str], with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tree_entry(folder: Path, path: str) -> dict[str, Any]:
    data = (folder / path).read_bytes()
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
