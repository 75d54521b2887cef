"""A server on this machine that speaks what huggingface_hub speaks with the Hugging Face Hub, as far as is needed."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USERS = {"right": "ann", "other": "bob"}
"""Who may do what is told by the token: `ann` everything, `bob` read what is public."""


def sha1(content):
    return hashlib.sha1(content).hexdigest()  # noqa: S324 - what git and so the hub names things by


@dataclass
class Repository:
    """What one repository holds: the files of each commit, and what its branches lead to."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files, revision="main"):
        """Put files into a new commit, and let a branch lead to it; return its name."""
        files = {**self.commits.get(self.refs.get(revision), {}), **files}
        name = sha1(repr((len(self.commits), sorted(files.items()))).encode())
        self.commits[name] = files
        self.refs[revision] = name
        return name


class Hub(ThreadingHTTPServer):
    """The server: its repositories, what it was asked, and what is wrong with it.

    Attributes:
        repositories: What it holds, by id.
        asked: What it was asked: `"HEAD /user/name/resolve/main/file"`.
        cut: The name of a file of which only half is sent, before the connection is closed; and nothing on later tries.
        broken: The number that every request is answered with.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.asked = []
        self.cut = None
        self.broken = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Say nothing of clients that go away."""


@contextlib.contextmanager
def serving():
    """Run a hub, and give it to a block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class RefusedError(Exception):
    """The answer to a request that is not granted."""

    def __init__(self, status, code="", message="", content=None):
        super().__init__(status)
        self.content = {} if content is None else content
        self.answer = status, {"X-Error-Code": code, "X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        """Print nothing."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        """Answer the request, or say why not."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.server.asked.append(f"{self.command} {unquote(url.path)}")
        try:
            if parts[0] == "api":
                self.send(json.dumps(self.api(parts[1:], body)).encode(), {"Content-Type": "application/json"})
            else:
                split = parts.index("resolve")
                self.resolve("/".join(parts[:split]), parts[split + 1], "/".join(parts[split + 2 :]))
        except RefusedError as refused:
            status, headers = refused.answer
            self.send(json.dumps(refused.content).encode(), headers, status)

    def send(self, content, headers, status=HTTPStatus.OK, part=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:part])

    @property
    def user(self):
        if self.server.broken:
            raise RefusedError(self.server.broken)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise RefusedError(HTTPStatus.UNAUTHORIZED, message="Invalid credentials in Authorization header")
        return USERS.get(token)

    def repository(self, name):
        """Return a repository, if who asks may know of it."""
        found = self.server.repositories.get(name)
        user = self.user
        if found is None or (found.private and user != "ann"):
            raise RefusedError(HTTPStatus.NOT_FOUND if user else HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Not found")
        if found.gated and user != "ann":
            raise RefusedError(HTTPStatus.FORBIDDEN, "GatedRepo", "Ask the authors")
        return found

    def files(self, name, revision):
        """Return the commit to which a revision leads, and its files."""
        found = self.repository(name)
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            raise RefusedError(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return commit, found.commits[commit]

    def resolve(self, name, revision, path):
        """Send a file."""
        commit, files = self.files(name, revision)
        if path not in files:
            raise RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound")
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha1(content)}"'}
        if self.command == "GET" and self.server.cut == path:
            self.server.cut = "everything"
            self.send(content, headers, part=len(content) // 2)
            self.close_connection = True
        elif self.command == "GET" and self.server.cut == "everything":
            self.close_connection = True
        else:
            self.send(content, headers)

    def api(self, parts, body):
        """Return the answer to a call that is not for a file itself."""
        if parts == ["validate-yaml"]:
            return {"errors": [], "warnings": []}
        if parts == ["repos", "create"]:
            return self.create(json.loads(body))
        name, call, revision = (
            "/".join(parts[1:3]),
            parts[3] if parts[3:] else "info",
            parts[4] if parts[4:] else "main",
        )
        if call in {"info", "revision"}:
            commit, _ = self.files(name, revision)
            return {"id": name, "sha": commit}
        if call == "tree":
            _, files = self.files(name, revision)
            if parts[5:]:
                raise RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound")
            return [{"type": "file", "path": path, "size": len(data), "oid": ""} for path, data in files.items()]
        if self.user != "ann":
            raise RefusedError(HTTPStatus.FORBIDDEN, message="You may not write here")
        found = self.repository(name)
        if call == "branch":
            found.refs.setdefault(revision, found.refs.get("main", ""))
            return {}
        if call == "preupload":
            paths = [item["path"] for item in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        lines = [json.loads(line) for line in body.splitlines()]
        found.messages.append(lines[0]["value"]["summary"])
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        request = "create_pr" in self.query
        commit = found.commit(files, "refs/pr/1" if request else revision)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"}
        return answer | ({"pullRequestUrl": f"{self.server.url}/{name}/discussions/1"} if request else {})

    def create(self, asked):
        """Make a repository."""
        if self.user != "ann" or asked.get("organization") not in {None, "ann"}:
            raise RefusedError(HTTPStatus.FORBIDDEN, message="You may not make that")
        name = f"ann/{asked['name']}"
        if name in self.server.repositories:
            raise RefusedError(HTTPStatus.CONFLICT, content={"url": f"{self.server.url}/{name}"})
        private = asked.get("private") or asked.get("visibility") == "private"
        made = self.server.repositories[name] = Repository(private=bool(private))
        made.commit({".gitattributes": b""})
        return {"url": f"{self.server.url}/{name}"}
