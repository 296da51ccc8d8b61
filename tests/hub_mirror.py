"""A small mirror of the Hugging Face hub: repositories in folders, served as the hub serves them."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

LARGE = 2000
"""Bytes from which a file counts as a large one, whose digest is a SHA-256."""


class Mirror:
    """What a mirror serves, and what it was asked for.

    Attributes:
      url: value of HF_ENDPOINT.
      root: holds `models/OWNER/NAME/` and `datasets/OWNER/NAME/`.
      cut: names of files of which the next answer ends in the middle.
      damaged: names of files that are served with a changed byte.
      asked: (file, first byte) of each request for a file's content.
    """

    def __init__(self, root: Path):
        self.root, self.url = root, ""
        self.cut: set[str] = set()
        self.damaged: set[str] = set()
        self.asked: list[tuple[str, int]] = []


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Mirror]:
    """Serves the repositories below `root` while the context is open."""
    mirror = Mirror(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, status: int, content: bytes, headers: dict[str, str], size: int | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content) if size is None else size)} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if path.startswith("/api/"):
                if "/tree/main" not in path:
                    self._answer(404, b"", {})
                    return
                kind, owner, name, _, _, *inside = path.removeprefix("/api/").split("/")
                folder = root / kind / owner / name
                files = sorted(file for file in folder.joinpath(*inside).rglob("*") if file.is_file())
                listed = [_entry(file, folder) for file in files]
                self._answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
                return
            kind, _, rest = ("datasets", "", path[10:]) if path.startswith("/datasets/") else ("models", "", path[1:])
            repo, _, name = rest.partition("/resolve/main/")
            file = root / kind / repo / name
            if not file.is_file():
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content, entry = file.read_bytes(), _entry(file, root / kind / repo)
            headers = {
                "X-Repo-Commit": "0" * 40,
                "ETag": f'"{entry.get("lfs", entry)["oid"]}"',
                "Accept-Ranges": "bytes",
            }
            start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            if self.command == "GET":
                mirror.asked.append((name, start))
            if name in mirror.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            part = content[start:]
            if self.command == "GET" and name in mirror.cut:
                mirror.cut.discard(name)
                self._answer(206 if start else 200, part[: len(part) // 2], headers, len(part))
                self.close_connection = True
                return
            self._answer(206 if start else 200, part, headers)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    mirror.url = f"http://localhost:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield mirror
    finally:
        server.shutdown()
        server.server_close()


def _entry(file: Path, folder: Path) -> dict[str, object]:
    content = file.read_bytes()
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry = {"type": "file", "path": file.relative_to(folder).as_posix(), "size": len(content), "oid": git}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
