"""A stand-in for the Hugging Face hub on loopback, as far as its file system and uploads go, and plain files by http.

`pytest_plugins = ["hub"]`. Files are in memory; what is not answered as the hub answers is an error of the test.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem

from patchrank.store import storage

REPO = r"(?P<kind>datasets|models)/(?P<repo>[^/]+/[^/]+)"


class Hub:
    """What the stand-in holds.

    Attributes:
        repos: files by repository, "datasets/me/photos" -> {path: bytes}.
        plain: files by path, served at ENDPOINT/plain/PATH.
        requests: method and path of each.
        failures: how many of the next reads of a file fail with status 503.
        ranges: whether plain files are sent in parts where these are asked for.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.plain: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures = 0
        self.ranges = True
        self.endpoint = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # who asked has seen enough
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _missing(self, what: str) -> None:
        self._send(404, b"{}", X_Error_Code=what, X_Error_Message=f"{what}: not there")

    def _file(self, data: bytes, ranges: bool = True) -> None:
        if self.hub.failures and self.command == "GET":
            self.hub.failures -= 1
            self._send(503)
            return
        told = {"ETag": '"0"', "X_Repo_Commit": "0" * 40} | ({"Accept_Ranges": "bytes"} if ranges else {})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranges and asked and self.command == "GET":
            start = int(asked[1])
            end = min(int(asked[2]) if asked[2] else len(data) - 1, len(data) - 1)
            part = data[start : end + 1]
            self._send(206, part, Content_Range=f"bytes {start}-{end}/{len(data)}", **told)
            return
        self._send(200, data, Content_Length=str(len(data)), **told)

    def _entry(self, files: dict[str, bytes], path: str) -> dict[str, object] | None:
        if path in files:
            return {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40}
        if any(name.startswith(f"{path}/") for name in files):
            return {"type": "directory", "path": path, "oid": "0" * 40}
        return None

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((self.command, path))
        if path.startswith("/plain/"):
            name = path.removeprefix("/plain/")
            self._file(self.hub.plain[name], self.hub.ranges) if name in self.hub.plain else self._send(404)
            return
        if found := re.fullmatch(r"/(?:(datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)", path):
            files = self.hub.repos.get(f"{found[1] or 'models'}/{found['repo']}", {})
            self._file(files[found["path"]]) if found["path"] in files else self._missing("EntryNotFound")
            return
        if found := re.fullmatch(rf"/api/{REPO}/tree/[^/]+(?:/(?P<path>.*))?", path):
            files, folder = self.hub.repos[f"{found['kind']}/{found['repo']}"], found["path"] or ""
            start = f"{folder}/" if folder else ""
            below = [name.removeprefix(start) for name in files if name.startswith(start)]
            if not below and folder:
                self._missing("EntryNotFound")
                return
            names = {name for each in below for name in [each.split("/")[0]]}
            if parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true":
                names = {"/".join(each.split("/")[:depth]) for each in below for depth in range(1, each.count("/") + 2)}
            self._json([self._entry(files, start + name) for name in sorted(names)])
            return
        if found := re.fullmatch(rf"/api/{REPO}(?:/revision/[^/]+)?", path):
            name = f"{found['kind']}/{found['repo']}"
            if name in self.hub.repos:
                self._json({"id": found["repo"], "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
            else:
                self._missing("RepoNotFound")
            return
        self._missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            self.hub.repos.setdefault(f"{asked['type']}s/{owner}/{asked['name']}", {})
            self._json({"url": f"{self.hub.endpoint}/{asked['type']}s/{owner}/{asked['name']}"})
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif found := re.fullmatch(rf"/api/{REPO}/paths-info/[^/]+", path):
            files = self.hub.repos.get(f"{found['kind']}/{found['repo']}", {})
            entries = [self._entry(files, name) for name in parse_qs(body.decode()).get("paths", [])]
            self._json([entry for entry in entries if entry])
        elif found := re.fullmatch(rf"/api/{REPO}/preupload/[^/]+", path):
            asked = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif found := re.fullmatch(rf"/api/{REPO}/commit/[^/]+", path):
            files = self.hub.repos[f"{found['kind']}/{found['repo']}"]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            url = f"{self.hub.endpoint}/{found['kind']}/{found['repo']}/commit/{'0' * 40}"
            self._json({"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self._missing("RepoNotFound")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the Hugging Face one; others that it starts find it by HF_ENDPOINT."""
    found = Hub()
    handler = type("Handler", (_Handler,), {"hub": found})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", found.endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.endpoint)
    template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(storage, "READ_PAUSES", (0.01, 0.02))
    storage._remote.cache_clear()
    HfFileSystem.clear_instance_cache()
    yield found
    storage._remote.cache_clear()
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()
