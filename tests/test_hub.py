"""--push_to_hub against a small hub of its own: what is asked before training, and what arrives after it."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from conftest import run_in_process
from huggingface_hub import HfApi
from launching import error_of, quick

import common.hub
import train_flash_lora

FLAGS = ["--push_to_hub", "--hub_model_id", "me/few-steps"]


@pytest.fixture
def hub(monkeypatch):
    """({path: bytes} of a repository, what was asked, parts of paths to refuse) of a hub that HfApi speaks to here."""
    files, asked, refused = {}, [], []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            asked.append(self.path)
            self.answer({"name": "me", "type": "user", "auth": {}})

        def do_POST(self):
            asked.append(self.path)
            if any(part in self.path for part in refused):
                return self.answer({"error": "not yours"}, 403)
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.path.endswith("/repos/create"):
                self.answer({"url": "https://huggingface.co/me/few-steps"})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            elif "/commit/" in self.path:
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.answer(
                    {
                        "commitUrl": "https://huggingface.co/me/few-steps/commit/0",
                        "commitOid": "0" * 40,
                        "pullRequestUrl": None,
                    }
                )
            else:
                self.answer({})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: HfApi(endpoint=address, token="hf_x"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield files, asked, refused
    server.shutdown()


def test_a_run_uploads_its_final(hub, pipelines, tmp_path):
    files, asked, _ = hub
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path / "run", *FLAGS, steps=1))
    assert asked[0].endswith("/repos/create")  # before it trained
    final = tmp_path / "run" / "lora" / "final"
    assert files.keys() == {str(file.relative_to(final)) for file in final.rglob("*") if file.is_file()}
    for name in files.keys() - {"README.md"}:
        assert files[name] == (final / name).read_bytes()
    card = files["README.md"].decode()
    assert 'load_lora_weights("me/few-steps")' in card and str(final) not in card
    assert "base_model:" not in card  # a folder of this machine is no model of the hub's


def test_a_name_of_its_own(hub, tmp_path):
    args = train_flash_lora.parse_args(["--push_to_hub", "--output_dir", str(tmp_path / "fast" / "final")])
    common.hub.check_hub(args)
    assert args.hub_model_id == "me/fast"


def test_mistakes_are_said_before_training(hub, pipelines, tmp_path, monkeypatch, capsys):
    def said(*more):
        return error_of(train_flash_lora, quick(pipelines, tmp_path / "run", *more), capsys)

    assert "--hub_model_id says where to --push_to_hub" in said("--hub_model_id", "me/x")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_x"))
    assert "--push_to_hub me/few-steps: the hub does not take it" in said(*FLAGS)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "not logged in to the hub: run `hf auth login`" in said(*FLAGS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so nothing can be uploaded" in said(*FLAGS)
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_loses_nothing(hub, pipelines, tmp_path, capsys):
    hub[2].append("/preupload/")
    error = error_of(train_flash_lora, quick(pipelines, tmp_path / "run", *FLAGS, steps=1), capsys)
    final = tmp_path / "run" / "lora" / "final"
    assert f"the output is whole, and `hf upload me/few-steps {final}` tries again" in error
    assert (final / "pytorch_lora_weights.safetensors").is_file()
