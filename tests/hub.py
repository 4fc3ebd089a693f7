"""A hub of models on this machine: what the hub's client asks for, of folders that a test names; it notes every file that was asked for."""

import hashlib
import json
import shutil
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

COMMIT, NAME = "0123456789abcdef0123456789abcdef01234567", "owner/tiny-sd"


class Hub(BaseHTTPRequestHandler):
    """`server.models`: folders by name; `server.fetched`: the files that were given out, as owner/model/file."""

    def log_message(self, *_) -> None:
        pass

    def answer(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        kind, name = (parts[:2], "/".join(parts[2:4])) if parts[0] == "api" else (["file"], "/".join(parts[:2]))
        if (folder := self.server.models.get(name)) is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if kind == ["api", "models"]:
            files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
            tree = [{"type": "file", "path": path, "size": size, "oid": digest(path.encode())} for path, size in files.items()]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
            return self.answer(200, json.dumps(tree if "tree" in parts else info).encode(), {"Content-Type": "application/json"})
        path = "/".join(parts[4:])  # owner/model/resolve/revision/...
        if not (folder / path).is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if self.command == "GET":
            self.server.fetched.append(f"{name}/{path}")
        data = (folder / path).read_bytes()
        return self.answer(200, data, {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET


def digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@contextmanager
def serving(models: dict[str, Path]):
    """The server, at `server.address`, while the body runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.models, server.fetched, server.address = models, [], f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def put(folder, cache, commit=COMMIT, name=NAME):
    """A folder in the cache, laid out as the hub's library does: links to blobs, by commit, and what `main` is."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "blobs").mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = model / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = model / "blobs" / f"{commit[:8]}{number:03}"
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(commit)
    return model
