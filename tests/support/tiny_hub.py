"""A Hugging Face Hub with one repository, on this machine: what is fetched of it can be told."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

NAME = "nobody/tiny"
_COMMIT = "a" * 40


class TinyHub(ThreadingHTTPServer):
    """Serves the files of a directory.

    Attributes
    ----------
    fetched : set of str
        Those that somebody got.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.fetched: set[str] = set()

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to ask this hub and no other, and keeps what it gets in `home`."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: TinyHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path, directory = urlparse(self.path).path, self.server.directory
        files = {str(file.relative_to(directory)): file for file in directory.rglob("*") if file.is_file()}
        head = {"X-Repo-Commit": _COMMIT}
        status, data = 200, b""
        if path.startswith(f"/api/models/{NAME}/tree/"):
            data = json.dumps(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(name.encode()).hexdigest(),
                    }
                    for name, file in files.items()
                    if "/" not in name
                ]
            ).encode()
        elif path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in files]
            data = json.dumps({"id": NAME, "sha": _COMMIT, "siblings": siblings, "tags": []}).encode()
        elif path.startswith(f"/{NAME}/resolve/") and (name := path.split("/", 5)[5]) in files:
            data = files[name].read_bytes()
            head["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            if body:
                self.server.fetched.add(name)
        else:
            status, head["X-Error-Code"] = 404, "EntryNotFound"
        self.send_response(status)
        for key, value in {**head, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextlib.contextmanager
def hub(directory: Path) -> Iterator[TinyHub]:
    """Serve a directory as :data:`NAME` while the block runs."""
    with TinyHub(directory) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
