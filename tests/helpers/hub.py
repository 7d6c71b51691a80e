"""A stand-in for the Hub's HTTP API, and processes that talk to it. No heavy imports: `_connect` comes before them."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Commit:
    """A state of a repository."""

    message: str
    files: dict[str, bytes]
    changed: set[str]
    sha: str


@dataclass
class Hub:
    """What the server holds: the commits of every repository, oldest first."""

    repos: dict[str, list[Commit]] = field(default_factory=dict)
    endpoint: str = ""

    def commit(self, repo: str, message: str, changed: dict[str, bytes]) -> Commit:
        """Add a commit to a repository, which is made if it is not there."""
        commits = self.repos.setdefault(repo, [])
        sha = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        files = {**(commits[-1].files if commits else {}), **changed}
        commits.append(Commit(message, files, set(changed), sha))
        return commits[-1]

    def at(self, repo: str, revision: str) -> Commit | None:
        """The commit of a revision: a hash, or main."""
        commits = self.repos[repo]
        return commits[-1] if revision == "main" else next((c for c in commits if c.sha == revision), None)


def blob_id(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != "Bearer x":
            self._error(401, "Unauthorized")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo in self.hub.repos else 200
            if status == 200:
                self.hub.commit(repo, "initial commit", {".gitattributes": b""})
            self._json({"url": f"{self.hub.endpoint}/{repo}"}, status)
        elif path == "/api/validate-yaml":
            base = re.search(r"^base_model: (.*)$", json.loads(body)["content"].partition("\n---")[0], re.MULTILINE)
            if base is None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1]):
                self._json({})
            else:
                self._json({"errors": [{"message": f'"base_model" with value "{base[1]}" is not valid'}]}, 400)
        elif asked := re.fullmatch(r"/api/models/(.+?/.+?)/preupload/(.+)", path):
            old = {path: blob_id(content) for path, content in self.hub.at(asked[1], asked[2]).files.items()}
            paths = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": path, "oid": old.get(path), **regular} for path in paths]})
        elif asked := re.fullmatch(r"/api/models/(.+?/.+?)/commit/(.+)", path):
            header, *operations = map(json.loads, body.splitlines())
            files = {o["value"]["path"]: base64.b64decode(o["value"]["content"]) for o in operations}
            sha = self.hub.commit(asked[1], header["value"]["summary"], files).sha
            self._json({"commitUrl": f"{self.hub.endpoint}/{asked[1]}/commit/{sha}", "commitOid": sha})
        else:
            self._error(501, f"POST {path} is not known")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        asked = resolve or tree or re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        if asked is None:
            self._error(501, f"{self.command} {path} is not known")
        elif asked[1] not in self.hub.repos:
            self._error(404, "RepoNotFound")
        elif (commit := self.hub.at(asked[1], asked[2] or "main")) is None:
            self._error(404, "RevisionNotFound")
        elif tree:
            files = commit.files.items()
            self._json([{"type": "file", "path": n, "size": len(c), "oid": blob_id(c)} for n, c in files])
        elif not resolve:
            siblings = [{"rfilename": name} for name in commit.files]
            self._json({"id": asked[1], "sha": commit.sha, "siblings": siblings, "tags": []})
        elif resolve[3] in commit.files:
            content = commit.files[resolve[3]]
            self._send(200, content, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit.sha})
        else:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit.sha})

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None: ...

    def _json(self, answer: Any, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub of its own, on a free port, until the end of the context."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def _connect(endpoint: str, home: Path) -> None:
    """Make this process one that has this hub for the Hub. To be called before huggingface_hub is imported."""
    os.environ.update({"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": "x", "HF_HUB_OFFLINE": "0"})
    os.environ.update({"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"})


def client(hub: Hub, home: Path) -> ProcessPoolExecutor:
    """One fresh process, connected to the hub, with a cache of its own."""
    return ProcessPoolExecutor(1, get_context("spawn"), _connect, (hub.endpoint, home))
