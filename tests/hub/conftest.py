"""A stand-in of the Hub on loopback, for the unmodified huggingface_hub client, and clients in processes of their own.

The client reads its environment when it is imported, so each script runs in a process with the stand-in's address.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OWNER, TOKEN, OTHER_TOKEN = "user", "hf_owner", "hf_other"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass
class Repo:
    """Commits, oldest first, each an id and all its files; names of revisions; who may read it."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        parent = self.names.get(branch, "")
        made = hashlib.sha1(f"{parent}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((made, files))
        self.names[branch] = made
        return made

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        wanted = self.names.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == wanted), None)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: "Hub"

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", headers=None, error=None):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        if error:
            headers["X-Error-Code"], headers["X-Error-Message"] = error, error
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (TOKEN, OTHER_TOKEN):
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, path)
            if self.command in method and found:
                return function(self, token, body, **found.groupdict())
        return self.answer(404, {"error": f"the stand-in has no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def repo(self, name: str, token: str, write: bool = False) -> Repo | None:
        """The repository, or None after an error was sent."""
        repo = self.hub.repos.get(name)
        if repo is None or repo.private and token != TOKEN:
            self.answer(404 if token else 401, {"error": "Repository not found"}, error="RepoNotFound")
            return None
        if write and token != TOKEN:
            self.answer(403, {"error": "You don't have the rights to write"})
            return None
        return repo

    def commit_of(self, name: str, token: str, revision: str):
        repo = self.repo(name, token)
        commit = repo and repo.at(revision)
        if repo is not None and commit is None:
            self.answer(404, {"error": "Invalid rev id"}, error="RevisionNotFound")
        return commit

    # --- the routes ---

    def whoami(self, token, body):
        if not token:
            return self.answer(401, {"error": "log in"})
        return self.answer(body={"type": "user", "name": OWNER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, token, body):
        if token != TOKEN:
            return self.answer(401 if not token else 403, {"error": "You don't have the rights to create a model"})
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = {"url": f"{self.hub.address}/{name}", "name": name, "id": "1"}
        if name in self.hub.repos:
            return self.answer(409, url | {"error": "You already created this model repo"})
        self.hub.repos[name] = Repo(bool(asked.get("private") or asked.get("visibility") == "private"))
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(body=url)

    def validate_yaml(self, token, body):
        text = json.loads(body)["content"]
        found = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
        yaml.safe_load(found[1] if found else "")
        return self.answer(body={"errors": [], "warnings": []})

    def preupload(self, token, body, name, revision):
        if self.repo(name, token, write=True) is None:
            return None
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self.answer(body={"files": files})

    def lfs_batch(self, token, body, name):
        if self.repo(name, token, write=True) is None:
            return None
        objects = [
            item
            | (
                {}
                if item["oid"] in self.hub.lfs
                else {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{item['oid']}"}}}
            )
            for item in json.loads(body)["objects"]
        ]
        return self.answer(body={"transfer": "basic", "objects": objects})

    def lfs_put(self, token, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "not what was announced"})
        self.hub.lfs[oid] = body
        return self.answer()

    def commit(self, token, body, name, revision):
        repo = self.repo(name, token, write=True)
        if repo is None:
            return None
        parent, files = repo.at(revision) or ("", {})
        files = dict(files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", parent) != parent:
                return self.answer(412, {"error": "A commit has happened since"})
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        made = repo.commit(files, revision)
        url = f"{self.hub.address}/{name}/commit/{made}"
        return self.answer(body={"success": True, "commitOid": made, "commitUrl": url})

    def info(self, token, body, name, revision="main"):
        commit = self.commit_of(name, token, revision)
        if commit is None:
            return None
        siblings = [{"rfilename": path} for path in commit[1]]
        return self.answer(
            body={"_id": "1", "id": name, "sha": commit[0], "siblings": siblings, "tags": [], "private": False}
        )

    def tree(self, token, body, name, revision):
        commit = self.commit_of(name, token, revision)
        if commit is not None:
            self.answer(body=[self.entry(path, content) for path, content in commit[1].items()])

    def paths_info(self, token, body, name, revision):
        commit = self.commit_of(name, token, revision)
        if commit is not None:
            asked = json.loads(body)["paths"]
            self.answer(body=[self.entry(path, commit[1][path]) for path in asked if path in commit[1]])

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def refs(self, token, body, name):
        repo = self.repo(name, token)
        if repo is not None:
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.names.items()]
            self.answer(body={"branches": branches, "converts": [], "tags": []})

    def resolve(self, token, body, name, revision, file):
        commit = self.commit_of(name, token, revision)
        if commit is None:
            return None
        headers = {"X-Repo-Commit": commit[0]}
        if file not in commit[1]:
            return self.answer(404, {"error": "Entry not found"}, headers, error="EntryNotFound")
        content = commit[1][file]
        headers["ETag"] = f'"{git_oid(content)}"'
        if file.endswith(LFS_SUFFIXES):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self.answer(206, content[start : end + 1], headers)
        return self.answer(200, content, headers)


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}(?:/.*)?", Handler.tree),
    ("POST", f"/api/models/{NAME}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", f"/api/models/{NAME}/refs", Handler.refs),
    (("GET", "HEAD"), f"/{NAME}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
]


@dataclass
class Hub:
    """The stand-in: its repositories and large files, and every request that it was sent."""

    address: str
    home: Path
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def new_repo(self, name: str, private: bool = False) -> Repo:
        self.repos[name] = Repo(private)
        return self.repos[name]

    def run(self, code: str, *arguments: str, token: str = TOKEN, offline: bool = False, home: str = "home") -> dict:
        """What ``code`` writes into the dict ``said``, from a process whose Hub this is."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": self.address, "HF_HOME": str(self.home / home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        environment |= {"HF_TOKEN": token} if token else {}
        environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        code = f"import json, sys\nsaid = {{}}\n{code}\nprint('SAID' + json.dumps(said))"
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=self.home)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.rpartition("SAID")[2])


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", tmp_path)
    Handler.hub = hub
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()
