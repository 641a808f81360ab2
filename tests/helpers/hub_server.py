"""A small hub on 127.0.0.1, for the real `huggingface_hub` client: it serves folders as models and datasets.

    with HubServer(models={"org/name": folder}, datasets={"org/data": folder}) as hub:
        use_hub(monkeypatch, hub, cache)            # the client in this process
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})  # or one in another process

It speaks what the client asks: a repository's revision, its tree, and its files with HEAD, GET and ranges. With
`uploads`, a folder, it also takes repositories from whoever brings the token: those are made, filled and read there.
"""

import base64
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
LFS_BATCH = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


USER, TOKEN = "somebody", "hf_of_somebody"


class HubServer:
    """The running server; `requests` lists the method and path of everything that was asked of it.

    `gated` names repositories that refuse their files to everybody; `created`: how each new one was asked for.
    """

    def __init__(
        self,
        models: Mapping[str, Path] | None = None,
        datasets: Mapping[str, Path] | None = None,
        gated: frozenset[str] = frozenset(),
        uploads: Path | None = None,
    ) -> None:
        self.repositories = {"models": dict(models or {}), "datasets": dict(datasets or {})}
        self.gated, self.uploads = gated, uploads
        self.requests: list[str] = []
        self.created: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}  # large files by their SHA-256, before a commit names them
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


def log_in(monkeypatch: pytest.MonkeyPatch, token: str = TOKEN) -> None:
    """Let this process's hub client bring a token."""
    monkeypatch.setenv("HF_TOKEN", token)


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

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(HTTPStatus.UNAUTHORIZED)
        elif self.hub.uploads is None:
            self._refuse(HTTPStatus.FORBIDDEN)
        else:
            self._take(path, body)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"PUT {self.path}")
        oid = self.path.rpartition("/")[2]
        if oid == hashlib.sha256(data).hexdigest():
            self.hub.objects[oid] = data
            self._send(HTTPStatus.OK, b"", {})
        else:
            self._refuse(HTTPStatus.BAD_REQUEST)

    def _take(self, path: str, body: bytes) -> None:
        """A request that writes."""
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif match := LFS_BATCH.fullmatch(path):
            self._send_json(
                {"transfer": "basic", "objects": [self._lfs_object(o) for o in json.loads(body)["objects"]]}
            )
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {**file, "uploadMode": _upload_mode(file), "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            self._send_json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def _create(self, wanted: dict[str, Any]) -> None:
        repository = f"{wanted['organization'] or USER}/{wanted['name']}"
        content = {"url": f"{self.hub.url}/{repository}", "name": repository, "id": repository}
        if repository in self.hub.repositories["models"]:
            self._send_json(content, HTTPStatus.CONFLICT)
        elif repository.startswith("other/"):
            self._refuse(HTTPStatus.FORBIDDEN)
        else:
            assert self.hub.uploads is not None
            folder = self.hub.uploads / repository
            folder.mkdir(parents=True)
            self.hub.created[repository] = wanted
            self.hub.repositories["models"][repository] = folder
            self._send_json(content)

    def _lfs_object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": upload}}

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        folder = self.hub.repositories["models"][repository]
        for entry in (line["value"] for line in lines if line["key"] in ("file", "lfsFile")):
            content = entry.get("content")
            data = self.hub.objects[entry["oid"]] if content is None else base64.b64decode(content)
            (folder / entry["path"]).write_bytes(data)
        sha = commit_of(folder)
        self._send_json({"commitUrl": f"{self.hub.url}/{repository}/commit/{sha}", "commitOid": sha, "success": True})

    def _send_json(self, content: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed; `hub.requests` has it all."""

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._send_json({"name": USER} if known else {}, HTTPStatus.OK if known else HTTPStatus.UNAUTHORIZED)
        elif match := API.fullmatch(path):
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


def _upload_mode(file: dict[str, Any]) -> str:
    """Weights go apart from the commit, as the hub has it for every large file."""
    return "lfs" if file["path"].endswith(".safetensors") else "regular"


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tree_entry(folder: Path, path: str) -> dict[str, Any]:
    data = (folder / path).read_bytes()
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
