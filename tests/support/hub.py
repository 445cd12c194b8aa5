"""A server on loopback that plays the Hub's HTTP API, as far as a push needs it."""

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_PlantedTokenOfTheTestsNumberOne"
XET_TOKEN = "token-for-one-repository"


@dataclass
class Repository:
    """Its files: content, and whether they are large; its commits, the newest last."""

    private: bool
    files: dict[str, tuple[bytes, bool]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["a" * 40])


@dataclass
class Hub:
    """``fail``: statuses to answer with, by the part of a path, each used once from the front.
    ``owners``: whom the token may write to. ``cut``: bytes of the next upload to read before the
    connection is cut. ``lost``: commits that are made, and then answered with 500.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    fail: dict[str, list[int]] = field(default_factory=dict)
    owners: set[str] = field(default_factory=lambda: {"me"})
    calls: Counter[str] = field(default_factory=Counter)
    cut: int | None = None
    before_commit: Any = None
    lost: int = 0
    url: str = ""
    storage: str = ""
    """Where large files are to go by Xet, whose token is `XET_TOKEN`."""


class Handler(BaseHTTPRequestHandler):
    """Answers for ``hub``, which the server's class has."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.hub.cut is not None:
            self.rfile.read(min(self.hub.cut, length))
            self.hub.cut = None
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length) if length else self.chunked()
        for part, statuses in self.hub.fail.items():
            if part in path and statuses:
                self.hub.calls[f"failed {part}"] += 1
                self.tell(statuses.pop(0), {"error": "planted"})
                return
        if self.command != "PUT" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.tell(401, {"error": "Invalid credentials in Authorization header"})
            return
        self.hub.calls[f"{self.command} {path.split('/')[-1]}"] += 1
        self.tell(*self.found(path, body))

    def chunked(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def tell(self, status: int, content: Any, code: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        if isinstance(content, dict) and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(data)

    def found(self, path: str, body: bytes) -> tuple[Any, ...]:
        hub = self.hub
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/objects/"):
            hub.objects[path.split("/")[-1]] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [self.large(one) for one in wanted]}
        words = path.split("/")
        name, rest = "/".join(words[3:5]), words[5:]
        if words[1:3] != ["api", "models"] or name not in hub.repositories:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        repository = hub.repositories[name]
        if not rest or rest[0] == "revision":
            sha = repository.commits[-1]
            return 200, {"id": name, "private": repository.private, "sha": sha, "siblings": []}
        if rest[0] == "tree":
            return 200, [entry(path, *file) for path, file in repository.files.items()]
        if rest[0] == "xet-write-token":
            told = {"casUrl": hub.storage, "accessToken": XET_TOKEN, "exp": int(time.time()) + 3600}
            return 200, told
        if rest[0] == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in files
            ]
            return 200, {"files": modes}
        assert rest[0] == "commit", path
        return self.commit(name, repository, [json.loads(line) for line in body.splitlines()])

    def create(self, wanted: dict[str, Any]) -> tuple[Any, ...]:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] not in self.hub.owners:
            return 403, {"error": f"You don't have the rights to create a model under {name}"}
        if name in self.hub.repositories:
            return 409, {"error": "You already created this model repo"}
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.repositories[name] = Repository(private, {".gitattributes": (b"x", False)})
        return 200, {"url": f"{self.hub.url}/{name}"}

    def large(self, wanted: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.hub.objects:
            return found
        href = f"{self.hub.url}/objects/{wanted['oid']}"
        return found | {"actions": {"upload": {"href": href, "header": {}}}}

    def commit(self, name: str, repository: Repository, lines: list[Any]) -> tuple[Any, ...]:
        import base64

        if self.hub.before_commit is not None:
            self.hub.before_commit(repository)
            self.hub.before_commit = None
        if name.split("/")[0] not in self.hub.owners:
            return 403, {"error": "Forbidden"}
        header, *operations = lines
        if header["value"].get("parentCommit") not in (None, repository.commits[-1]):
            return 412, {"error": "A commit has happened since"}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                content = base64.b64decode(value["content"])
                repository.files[value["path"]] = (content, False)
            elif operation["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                assert sha256(content).hexdigest() == value["oid"]
                repository.files[value["path"]] = (content, True)
            else:
                del repository.files[value["path"]]
        repository.commits.append(sha1(str(len(repository.commits)).encode()).hexdigest())
        if self.hub.lost:
            self.hub.lost -= 1
            return 500, {"error": "planted"}
        url = f"{self.hub.url}/{name}/commit/{repository.commits[-1]}"
        return 200, {"success": True, "commitOid": repository.commits[-1], "commitUrl": url}


def entry(path: str, content: bytes, large: bool) -> dict[str, Any]:
    """A file of a repository, as the Hub lists it."""
    blob = sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if large:
        oid = sha256(content).hexdigest()
        found["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return found


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Serve ``hub`` in threads of this process, at ``hub.url``; ``shutdown`` ends it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Mine", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
