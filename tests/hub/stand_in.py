"""A stand-in for the Hub on 127.0.0.1: enough of its protocol for the real client to push, list and download.

It keeps repositories in memory, records every request, and refuses what the Hub refuses: no or a wrong token, somebody
else's namespace, metadata that is not valid.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "standinonlyneverarealtoken0123456789"
USER = "me"
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "other", "unknown"}
PIPELINES = {"image-segmentation", "image-feature-extraction", "object-detection", "image-classification"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}


@dataclass
class Repo:
    """One repository, of a model or a data set: for each branch, its commits' files."""

    private: bool
    gated: bool = False  # its files are for those who were let in, which nobody was
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})

    def files(self, revision: str) -> dict[str, bytes] | None:
        for commits in self.branches.values():
            for index, files in enumerate(commits):
                if self.sha(commits, index) == revision:
                    return files
        return self.branches[revision][-1] if revision in self.branches else None

    def commit(self, revision: str) -> str:
        for commits in self.branches.values():
            if revision in {self.sha(commits, index) for index in range(len(commits))}:
                return revision
        return self.sha(self.branches[revision], -1)

    @staticmethod
    def sha(commits: list[dict[str, bytes]], index: int) -> str:
        index %= len(commits)
        state = repr([sorted((k, hashlib.sha256(v).hexdigest()) for k, v in c.items()) for c in commits[: index + 1]])
        return hashlib.sha1(f"{index}{state}".encode()).hexdigest()


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Hub:
    """The state behind the server."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {"somebody/model": Repo(private=False)}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.messages: list[str] = []
        self.refuse_uploads = 0
        self.endpoint = ""


def problems(content: str) -> list[str]:
    """What the Hub's own check says of a card's metadata, as far as cards use it."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if found is None:
        return ["no metadata"]
    data = yaml.safe_load(found[1])
    rules = {
        "license": lambda v: v in LICENCES,
        "library_name": lambda v: v == "transformers",
        "pipeline_tag": lambda v: v in PIPELINES,
        "base_model": lambda v: all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in v),
        "base_model_relation": lambda v: v in RELATIONS,
        "datasets": lambda v: all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in v),
        "tags": lambda v: all(isinstance(tag, str) for tag in v),
        "metrics": lambda v: all(isinstance(name, str) for name in v),
        "model-index": lambda v: all(_is_result(result) for model in v for result in model["results"]),
    }
    wrong = [f"{key}: {data[key]!r}" for key, rule in rules.items() if key in data and not rule(data[key])]
    return wrong + [f"{key}: no such key" for key in data if key not in rules]


def _is_result(result: dict[str, Any]) -> bool:
    numbers = all(isinstance(metric["value"], float) and metric["type"] for metric in result["metrics"])
    return bool(numbers and result["task"]["type"] in PIPELINES and result["dataset"]["type"])


class Handler(BaseHTTPRequestHandler):
    """The protocol: what each request of huggingface_hub 2 gets for an answer."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the requests are recorded."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, self.path, dict(self.headers), body))
        routes = (
            (r"/api/repos/create", self._create),
            (r"/api/repos/delete", self._delete),
            (r"/api/validate-yaml", self._validate),
            (r"/api/whoami-v2", self._whoami),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/auth-check/write", self._auth_check),
            (r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+).*", self._tree),
            (r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/objects/(\w+)", self._put),
            (r"/verify", lambda _: self._send(200, {})),
            (r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        )
        for pattern, route in routes:
            if found := re.fullmatch(pattern, path):
                route(body, *found.groups())
                return
        self._send(404, {"error": f"no such route: {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, code: int, said: str, error: str = "") -> None:
        headers = {"X-Error-Message": said, **({"X-Error-Code": error} if error else {})}
        self._send(code, {"error": said}, headers)

    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _writable(self, repo: str) -> bool:
        """Answers with the Hub's refusal where this client may not write."""
        if not self._signed_in():
            self._refuse(401, "Invalid credentials in Authorization header")
        elif not repo.startswith(f"{USER}/"):
            self._refuse(
                403, f"You don't have the rights to create a model under the namespace {repo.split('/')[0]!r}"
            )
        elif repo not in self.hub.repos:
            self._refuse(404, "Repository not found", "RepoNotFound")
        else:
            return True
        return False

    def _readable(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; answers with the Hub's refusal where there are none to see."""
        held = self.hub.repos.get(repo)
        if held is None or (held.private and not self._signed_in()):
            self._refuse(401 if not self._signed_in() else 404, "Repository not found", "RepoNotFound")
            return None
        files = held.files(revision)
        if files is None:
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return files

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        if repo in self.hub.repos and self._signed_in() and repo.startswith(f"{USER}/"):
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo}"})
            return
        if self._signed_in() and repo.startswith(f"{USER}/"):
            self.hub.repos[repo] = Repo(private=asked.get("visibility") == "private")
        if self._writable(repo):
            self._send(200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def _delete(self, body: bytes) -> None:
        asked = json.loads(body)
        if self._writable(repo := f"{asked.get('organization') or USER}/{asked['name']}"):
            del self.hub.repos[repo]
            self._send(200, {})

    def _validate(self, body: bytes) -> None:
        found = problems(json.loads(body)["content"])
        content = {"errors": [{"message": text} for text in found], "warnings": []}
        self._send(400 if found else 200, content)

    def _whoami(self, body: bytes) -> None:
        if self._signed_in():
            self._send(200, {"name": USER, "type": "user", "orgs": []})
        else:
            self._refuse(401, "Invalid credentials in Authorization header")

    def _auth_check(self, body: bytes, repo: str) -> None:
        if self._writable(repo):
            self._send(200, {})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self._writable(repo):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        if not self._writable(repo):
            return
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/objects/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/verify"},
                }
            objects.append(answer)
        self._send(200, {"objects": objects, "transfer": "basic"})

    def _put(self, body: bytes, oid: str) -> None:
        if self.hub.refuse_uploads:
            self.hub.refuse_uploads -= 1
            self._refuse(400, "The upload broke off")
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._send(200, {})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self._writable(repo):
            return
        held = self.hub.repos[repo]
        if revision not in held.branches:
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        files = dict(held.branches[revision][-1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        held.branches[revision].append(files)
        sha = held.commit(revision)
        self._send(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        if not self._writable(repo):
            return
        branches = self.hub.repos[repo].branches
        known = branch in branches
        branches.setdefault(branch, [branches["main"][-1]])
        self._send(409 if known else 200, {"error": "Reference already exists"} if known else {})

    def _info(self, body: bytes, repo: str, revision: str | None) -> None:
        files = self._readable(repo, revision or "main")
        if files is not None:
            held = self.hub.repos[repo]
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repo, "modelId": repo, "private": held.private, "siblings": siblings, "tags": []}
            self._send(200, {**answer, "sha": held.commit(revision or "main")})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self._readable(repo, revision)
        if files is not None:
            entries = [{"type": "file", "path": k, "size": len(v), "oid": _oid(v)} for k, v in files.items()]
            self._send(200, entries)

    def _resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        files = self._readable(repo, revision)
        if files is None:
            return
        commit = {"X-Repo-Commit": self.hub.repos[repo].commit(revision)}
        if self.hub.repos[repo].gated and name != "README.md":
            self._refuse(403, f"Access to model {repo} is restricted", "GatedRepo")
        elif name in files:
            self._send(200, files[name], {**commit, "ETag": f'"{_oid(files[name])}"'})
        else:
            self._send(404, {"error": "Entry not found"}, {**commit, "X-Error-Code": "EntryNotFound"})


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A stand-in that listens while the context is open."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
