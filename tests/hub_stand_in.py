"""A stand-in for the Hub on loopback, which the real `huggingface_hub` client talks to: repositories of models with
commits, uploads of large files by LFS, downloads. It keeps everything in memory.

What it knows is what the client asks for when it creates, uploads, lists and downloads; anything else is answered 404
and noted in `unknown`, so that a test fails with the route that is missing. `breaks_after` makes uploads of large files
break off in the middle once so many are whole, `refuse_commits` answers commits with 403.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "tester"
TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".bin", ".png")  # what the Hub's .gitattributes keep by LFS
LARGE_FROM = 10_000_000  # bytes: above these everything


@dataclass
class Commit:
    """A state of a repository."""

    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    name: str
    private: bool
    commits: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def at(self, revision: str) -> Commit | None:
        """The commit of a name: `main` or an oid."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


@dataclass
class StandIn:
    """What the server holds, and how it misbehaves."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    uploads: list[str] = field(default_factory=list)  # sha256 of each whole upload of a large file
    unknown: list[str] = field(default_factory=list)
    breaks_after: int | None = None
    refuse_commits: bool = False

    def environment(self, home: Path) -> dict[str, str]:
        """For a process that uses this Hub and no other, with caches of its own."""
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip


@contextmanager
def hub_stand_in() -> Iterator[StandIn]:
    """The server, on a free port until the block ends."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answers,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > LARGE_FROM


class Answers(BaseHTTPRequestHandler):
    """One request; routes are tried in the order of `ROUTES`."""

    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle_request(self) -> None:
        url, self.read = urlsplit(self.path), None
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        for methods, pattern, answer in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, unquote(url.path))):
                return answer(self, *match.groups())
        self.hub.unknown.append(f"{self.command} {self.path}")
        self.refuse(404, "EntryNotFound", "the stand-in does not know this route")

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    # ---------------------------------------------------------------- what comes in and goes out

    def body(self) -> bytes:
        """Of the request, which can be read once only."""
        if self.read is None:
            self.read = self.receive()
        return self.read

    def receive(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, Content_Type="application/json")

    def refuse(self, status: int, code: str, message: str) -> None:
        self.body()  # a connection that is kept must be read to the end of the request
        content = json.dumps({"error": message}).encode()
        self.send(content, status, X_Error_Code=code, X_Error_Message=message, Content_Type="application/json")

    def repository(self, name: str) -> Repository | None:
        """The repository, which a stranger sees only if it is public; None if the request has been refused."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.is_owner()):
            self.refuse(404, "RepoNotFound", "Repository not found")
            return None
        return found

    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # ---------------------------------------------------------------- routes

    def who_am_i(self) -> None:
        if not self.is_owner():
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        self.send_json({"type": "user", "name": USER, "orgs": []})

    def nothing(self) -> None:
        """What the client asks for its own statistics."""
        self.refuse(404, "EntryNotFound", "not here")

    def create(self) -> None:
        asked = json.loads(self.body())
        if not self.is_owner():
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if asked.get("organization") not in (None, USER):
            return self.refuse(403, "Forbidden", f"no right to create {name}")
        exists = name in self.hub.repositories
        if not exists:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            files = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
            self.hub.repositories[name] = Repository(name, private, [Commit("0" * 40, "initial commit", files)])
        self.send_json({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, 409 if exists else 200)

    def check_yaml(self) -> None:
        """The Hub's own check is stricter; this one sees that the head of a card is YAML."""
        content = json.loads(self.body())["content"]
        try:
            head = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            errors = [] if isinstance(head, dict) else [{"message": "no mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        files = json.loads(self.body())["files"]
        modes = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
             "oid": self.oid_of(repository, file["path"])}
            for file in files
        ]  # fmt: skip
        self.send_json({"files": modes})

    @staticmethod
    def oid_of(repository: Repository, path: str) -> str | None:
        content = repository.files.get(path)
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if is_large(path, len(content)) else git_oid(content)

    def large_batch(self, name: str) -> None:
        if self.repository(name) is None:
            return
        objects = []
        for each in json.loads(self.body())["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.large:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def large_upload(self, oid: str) -> None:
        if self.hub.breaks_after is not None and len(self.hub.uploads) >= self.hub.breaks_after:
            self.rfile.read(min(1000, int(self.headers["Content-Length"]) // 2))
            # The connection is reset, not closed in good order: so a cable that is pulled looks to the client.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.send_json({"error": "the content is not what its hash says"}, 400)
        self.hub.large[oid] = content
        self.hub.uploads.append(oid)
        self.send(b"")

    def commit(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        if self.hub.refuse_commits or not self.is_owner():
            return self.send_json({"error": "You are not allowed to write to this repository."}, 403)
        files, title = dict(repository.files), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(f"{name} {len(repository.commits)} {os.getpid()}".encode()).hexdigest()
        repository.commits.append(Commit(oid, title, files))
        self.send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def information(self, name: str, revision: str = "main") -> None:
        if (repository := self.repository(name)) is None:
            return
        if (commit := repository.at(revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.send_json({"id": name, "sha": commit.oid, "private": repository.private, "siblings": siblings,
                        "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        if (repository := self.repository(name)) is None:
            return
        if (commit := repository.at(revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        paths = [path for path in sorted(commit.files) if not folder or path.startswith(f"{folder}/")]
        if folder and not paths:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        self.send_json([self.entry(path, commit.files[path]) for path in paths])

    def paths_info(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        asked, files = json.loads(self.body())["paths"], repository.at(revision).files
        self.send_json([self.entry(path, files[path]) for path in asked if path in files])

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if is_large(path, len(content)):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        if (commit := repository.at(revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if path not in commit.files:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist")
        content = commit.files[path]
        self.send(content, X_Repo_Commit=commit.oid, ETag=f'"{hashlib.sha256(content).hexdigest()}"')


REPOSITORY = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ({"GET"}, "/api/agent-harnesses", Answers.nothing),
    ({"GET"}, "/api/whoami-v2", Answers.who_am_i),
    ({"POST"}, "/api/repos/create", Answers.create),
    ({"POST"}, "/api/validate-yaml", Answers.check_yaml),
    ({"POST"}, f"/api/models/{REPOSITORY}/preupload/([^/]+)", Answers.preupload),
    ({"POST"}, f"/{REPOSITORY}.git/info/lfs/objects/batch", Answers.large_batch),
    ({"PUT"}, "/large/([0-9a-f]{64})", Answers.large_upload),
    ({"POST"}, f"/api/models/{REPOSITORY}/commit/([^/]+)", Answers.commit),
    ({"GET"}, f"/api/models/{REPOSITORY}/tree/([^/]+)/?(.*)", Answers.tree),
    ({"POST"}, f"/api/models/{REPOSITORY}/paths-info/([^/]+)", Answers.paths_info),
    ({"GET"}, f"/api/models/{REPOSITORY}/revision/([^/]+)", Answers.information),
    ({"GET"}, "/api/models/(.+)", Answers.information),
    ({"GET", "HEAD"}, f"/{REPOSITORY}/resolve/([^/]+)/(.+)", Answers.resolve),
)
