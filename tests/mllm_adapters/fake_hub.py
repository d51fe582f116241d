"""A hub on this machine: as much of its HTTP interface as downloads and uploads of models need.

Paths and fields are those that huggingface_hub 2.4 asks for (hf_api.py, _commit_api.py, lfs.py).
"""

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40


class FakeHub(ThreadingHTTPServer):
    """Serves and takes files of one model.

    Attributes:
        files: What the model holds, by path.
        asked: Paths of files that were downloaded.
        created: What ``create_repo`` was asked for.
        commits: Summaries of the commits.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.asked: list[str] = []
        self.created: list[dict[str, object]] = []
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[FakeHub]:
    """A hub that answers as long as the block lasts."""
    hub = FakeHub(files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if "/resolve/" in path:
            self._file(path.split(f"/{COMMIT}/", 1)[-1].split("/resolve/main/")[-1])
        elif "/tree/" in path:
            self._json([_entry(name, data) for name, data in self.server.files.items()])
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "org/model", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self._json({"error": "not found"}, 404)

    def do_POST(self) -> None:
        path = urlparse(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self._json({"url": f"{self.server.url}/org/model", "name": "org/model"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            self._json(
                {
                    "files": [
                        {"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None}
                        for p, m in modes.items()
                    ]
                }
            )
        elif path.endswith("/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/put/{o['oid']}"}}} for o in wanted
            ]
            self._json({"transfer": "basic", "objects": actions})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._json({"errors": [], "warnings": []})  # of the card

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self.path.rpartition("/")[2]] = data
        self._json({})

    def _commit(self, lines: list[dict[str, dict[str, str]]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.server.objects[value["oid"]]
                assert sha256(data).hexdigest() == value["oid"]
                self.server.files[value["path"]] = data
        self._json(
            {
                "commitUrl": f"{self.server.url}/org/model/commit/{COMMIT}",
                "commitOid": COMMIT,
                "success": True,
            }
        )

    def _file(self, name: str) -> None:
        data = self.server.files[name]
        if self.command == "GET":
            self.server.asked.append(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_entry(name, data)["oid"]}"'}
        self._send(data, 200, "application/octet-stream", headers)

    def _json(self, content: object, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, "application/json", {})

    def _send(self, data: bytes, status: int, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
