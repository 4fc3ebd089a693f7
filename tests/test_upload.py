"""The upload to a hub: every file, with the token of the environment, or one line."""

import base64
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ctrl import errors
from scripts import upload


class Hub(BaseHTTPRequestHandler):
    """The three answers that an upload of small files needs."""

    files: dict[str, bytes]
    asked: list[tuple[str, str]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.asked.append((self.path, self.headers["Authorization"]))
        host = f"http://{self.headers['Host']}"
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer(401, {"error": "no such token"})
        if self.path == "/api/validate-yaml" and b"base_model: /" in body:
            return self.answer(400, {"errors": [{"message": '"base_model" must be a string of the form owner/name'}]})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"success": True, "commitOid": "c" * 40, "commitUrl": f"{host}/me/coats/commit/{'c' * 40}"})
        return self.answer(200, {"url": f"{host}/me/coats", "name": "me/coats", "id": "me/coats"})

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    real = upload.HfApi
    monkeypatch.setattr(upload, "HfApi", lambda token: real(endpoint=endpoint, token=token))
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "out"
    (folder / "figures").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# An adapter\n")
    (folder / "label_embedding.safetensors").write_bytes(bytes(range(256)))
    (folder / "figures" / "teaser.png").write_bytes(b"\x89PNG" + bytes(100))
    return folder


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["upload", *arguments])
    try:
        errors.main(upload.main)
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_upload_sends_every_file_with_the_token_of_the_environment(exported, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert call(monkeypatch, str(exported), "--repository", "me/coats") == 0
    assert hub.files == {str(f.relative_to(exported)): f.read_bytes() for f in exported.rglob("*") if f.is_file()}
    assert "hf_right" not in "".join(capsys.readouterr()) and {token for _, token in hub.asked} == {"Bearer hf_right"}


def test_without_a_token_or_with_a_wrong_one_it_is_one_line(exported, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert call(monkeypatch, str(exported), "--repository", "me/coats") == 2
    assert capsys.readouterr().err.startswith("error: there is no HF_TOKEN in the environment") and not hub.asked
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    assert call(monkeypatch, str(exported), "--repository", "me/coats") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the hub refused me/coats") and said.count("\n") == 1 and "hf_wrong" not in said and not hub.files


def test_a_card_that_the_hub_refuses_and_a_name_without_an_owner_are_one_line(exported, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    (exported / "README.md").write_text("---\nbase_model: /data/sd\n---\n# An adapter\n")
    assert call(monkeypatch, str(exported), "--repository", "me/coats") == 2
    said = capsys.readouterr().err
    assert "error: the hub refused me/coats: Invalid metadata in README.md" in said and said.count("\n") == 1 and not hub.files
    for name in ("me", "me/", "/coats", "me/coats/more"):
        assert call(monkeypatch, str(exported), "--repository", name, "--dry-run") == 2
        assert capsys.readouterr().err == f"error: --repository is {name}: give owner/name\n"


def test_a_dry_run_lists_the_files_and_asks_nobody(exported, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert call(monkeypatch, str(exported), "--repository", "me/coats", "--dry-run") == 0
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert listed == sorted(str(f.relative_to(exported)) for f in exported.rglob("*") if f.is_file()) and not hub.asked
    shutil.rmtree(exported)
    exported.mkdir()
    assert call(monkeypatch, str(exported), "--repository", "me/coats") == 2
    assert "has no README.md: make it by scripts/export.py" in capsys.readouterr().err
