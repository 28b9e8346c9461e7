"""An export on the Hub: a server on this machine answers as the Hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from et_cuda_passes.hf import EtConfig, EtExporter
from tests.hf.models import bert, tokens

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    exported = EtExporter().export(bert(), tokens(), EtConfig(target="xnnpack", qlinear="8da4w"))
    exported.save_pretrained(tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of the server, and the files that it has sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path).partition("?")[0]
            names = sorted(file.name for file in folder.iterdir())
            if path.startswith("/api/models/org/name"):
                self.answer(json.dumps(self.about(path, names)).encode(), "application/json")
            elif (name := path.rpartition("/")[2]) in names and "/resolve/" in path:
                if self.command == "GET":
                    sent.append(name)
                self.answer((folder / name).read_bytes(), "application/octet-stream")
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def about(self, path: str, names: list[str]) -> object:
            if "/tree/" in path:
                return [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": COMMIT}
                    for name in names
                ]
            return {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}

        def answer(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_export_on_the_hub_is_downloaded_with_its_shared_files(
    folder: Path, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, sent = hub
    code = (
        "import torch; from et_cuda_passes.hf import ExportedModel; model = ExportedModel.from_pretrained('org/name'); "
        "ids = torch.arange(7)[None]; "
        "print(float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.norm()), "
        "len(model.report['targets']))"
    )
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"export.json", "model.etcp.json", "model.xnnpack.pte", "config.json", "report.json"} <= set(sent)
    assert len(sent) == len(set(sent))
    local = subprocess.run(
        [sys.executable, "-c", code.replace("org/name", str(folder))], capture_output=True, text=True, check=False
    )
    assert done.stdout == local.stdout != ""
