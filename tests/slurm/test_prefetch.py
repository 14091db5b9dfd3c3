"""After prefetch, a run needs no hub. The hub is a stand-in with the same protocol."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from embedscale.errors import DONE
from slurm import prefetch

NAME, COMMIT = "EleutherAI/pythia-14m", "0" * 39 + "1"


@pytest.fixture
def hub(tmp_path):
    """Serve one folder as a repository of a hub, and record the requested paths."""
    folder, asked = tmp_path / "repository", []
    folder.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            path, about = self.path.split("?")[0], f"/api/models/{NAME}"
            sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            if path == f"{about}/revision/main":
                body = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in sizes]}
                return self.answer(json.dumps(body).encode())
            if path == f"{about}/tree/{COMMIT}":
                body = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
                return self.answer(json.dumps(body).encode())
            if path.startswith((f"/{NAME}/resolve/main/", f"/{NAME}/resolve/{COMMIT}/")) and Path(path).name in sizes:
                return self.answer((folder / Path(path).name).read_bytes(), ETag=f'"{Path(path).name}"')
            self.send_error(404)
            return None

        do_GET = do_HEAD

        def answer(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            headers |= {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), "Content-Type": "application/json"}
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield SimpleNamespace(folder=folder, asked=asked, address=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("values", ["[pretrained, random]", "[random, pretrained]"])
def test_weights_are_fetched_if_any_run_needs_them(queued_sweep, monkeypatch, values):
    sweep, _ = queued_sweep(f"axes: {{budget: 1e15, backbone.weights: {values}}}")
    fetched = []
    monkeypatch.setattr(prefetch, "_fetch", lambda name, revision, weights: fetched.append((name, weights)))
    monkeypatch.setattr(prefetch, "prepare", lambda run: DONE)
    assert prefetch.prefetch(sweep) == DONE
    assert fetched == [(NAME, True)]


def test_after_prefetch_a_run_sends_no_request(laptop, hub, tmp_path, save_decoder):
    local = save_decoder(
        tmp_path / "local" / "pythia-14m", width=128, blocks=6, heads=4, vocab_size=512, max_position_embeddings=2048
    )
    shutil.copytree(local, hub.folder, dirs_exist_ok=True)
    (hub.folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    base = {"backbone.name": NAME, "data.store": str(tmp_path / "fetched")}
    sweep = laptop.write("fetched", base=base, axes={"budget": [2e10]}, methods=["full"], expected_pairs=10**6)
    network = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    assert "cannot be fetched" in laptop.sweep("prefetch", sweep, code=2, env=network | {"HF_HUB_OFFLINE": "1"})
    output = laptop.sweep("prefetch", sweep, env=network)
    assert f"{NAME}: " in output and (tmp_path / "fetched" / "manifest.json").exists()
    assert any("safetensors" in path for path in hub.asked) and not any(".bin" in path for path in hub.asked)

    hub.asked.clear()
    offline = network | {"HF_HUB_OFFLINE": "1"}
    assert "1 done" in laptop.sweep("submit", sweep, "--to", "here", env=offline)
    (run,) = laptop.directories("fetched")
    from_folder = laptop.write("folder", base=base | {"backbone.name": str(local)}, axes={"budget": [2e10]})
    assert "1 done" in laptop.sweep("submit", from_folder, "--to", "here")
    (other,) = laptop.directories("folder")
    assert run.read_record().weights_digest == other.read_record().weights_digest
    assert not hub.asked
