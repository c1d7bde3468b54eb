"""Publishing an adapter: what is in the folder, what is not, that it is still the student, and the push to the Hub."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from adapters import lora, save_adapter
from peft import PeftModel
from safetensors.torch import load_file
from tiny import byte_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgkd_peft.errors import ConfigError, ModelError
from pgkd_peft.export import card as publish
from pgkd_peft.export.adapter import read_run
from pgkd_peft.export.card import without_local_paths
from pgkd_peft.export.merge import merge_adapter
from pgkd_peft.export.publish import export_adapter
from pgkd_peft.model.cpu import guard_cpu_linear4bit
from pgkd_peft.model.load import load_base

QUIET = {"log": lambda _: None}
SUMMARY = {"base": 0.02, "teacher": 0.96, "student": 0.8125, "recovered": 0.8431, "n": 48, "drift": 0.0217}


def trained_run(tmp_path: Path, **options) -> Path:
    base = save_tiny(tmp_path / "base")
    folder = Path(save_adapter(tmp_path / "my-run", base, lora(), **options))
    byte_tokenizer().save_pretrained(folder)
    run = json.loads((folder / "run.json").read_text())
    run |= {"command": "pgkd train --config /home/me/r.yaml --lr=2e-4", "dataset_fingerprint": "sha256:feed"}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "completions.jsonl").write_text("{}\n")
    return folder


def test_folder_holds_what_others_need_and_nothing_of_this_machine(tmp_path):
    run, out = trained_run(tmp_path), tmp_path / "out"
    report = export_adapter(str(run), str(out), base_id="Org/Base-1B", **QUIET)
    assert report.files == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Org/Base-1B"
    assert (config["r"], config["inference_mode"]) == (4, True)
    card = (out / "README.md").read_text()
    for expected in ("base_model: Org/Base-1B", "library_name: peft", "0.8431", "0.0217", "n = 48", "sha256:feed"):
        assert expected in card
    assert "`pgkd train --config r.yaml --lr=2e-4`" in card
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
        assert b"/home/me" not in path.read_bytes(), path.name
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_plain_peft_on_a_plain_base_gives_the_students_logits(tmp_path, quantization):
    """The code of the model card, as a user would run it, against the model as training held it."""
    run, out = trained_run(tmp_path, quantization=quantization), tmp_path / "out"
    export_adapter(str(run), str(out), base_id="Org/Base", **QUIET)
    base = str(tmp_path / "base")
    student = PeftModel.from_pretrained(
        load_base(base, quantization=quantization, dtype=torch.bfloat16), str(run)
    ).eval()
    card = (out / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    scope: dict = {}
    exec(code.replace('"Org/Base"', repr(base)).replace('"THIS_ADAPTER"', repr(str(out))), scope)
    guard_cpu_linear4bit(scope["model"])
    ids = torch.tensor([[3, 50, 60, 70, 200, 9]])
    with torch.no_grad():
        expected, found = student(ids).logits, scope["model"].eval()(ids).logits
        with student.disable_adapter():
            without = student(ids).logits
    assert torch.equal(found, expected)
    assert (without - expected).abs().max() > 0.05
    assert scope["tokenizer"].chat_template == byte_tokenizer().chat_template
    assert ("BitsAndBytesConfig" in code) == (quantization == "nf4")


def test_local_base_needs_an_id(tmp_path):
    run = trained_run(tmp_path)
    with pytest.raises(ConfigError, match=r"local directory .*base, which nobody else has.*--base-id"):
        export_adapter(str(run), str(tmp_path / "out"), **QUIET)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "Org/Known"}))
    assert export_adapter(str(run), str(tmp_path / "out"), **QUIET).base_model == "Org/Known"


def test_hub_id_from_the_cache_layout_and_of_the_demo_model(tmp_path, monkeypatch):
    run = read_run(str(trained_run(tmp_path)), **QUIET)
    snapshot = tmp_path / "models--Org--My--Model" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "base").rename(snapshot)
    moved = type(run)(**{**run.__dict__, "base": snapshot, "base_name": str(snapshot)})
    assert publish.hub_id(moved) == "Org/My--Model"
    monkeypatch.setenv("PGKD_CACHE", str(tmp_path / "cache"))
    demo = tmp_path / "cache" / "SmolLM2-135M-Instruct"
    demo.parent.mkdir()
    snapshot.rename(demo)
    moved = type(run)(**{**run.__dict__, "base": demo, "base_name": str(demo)})
    assert publish.hub_id(moved) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert publish.hub_id(type(run)(**{**run.__dict__, "base_name": "Org/Remote"})) == "Org/Remote"


def test_a_local_path_in_the_adapters_config_is_refused(tmp_path):
    run = trained_run(tmp_path)
    config = run / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "auto_mapping": {"parent_library": "/home/me/code"}})
    )
    with pytest.raises(ModelError, match=r"adapter_config.json has the local path '/home/me/code' as 'parent_library'"):
        export_adapter(str(run), str(tmp_path / "out"), base_id="Org/Base", **QUIET)


def test_existing_output_and_unknown_format_are_refused(tmp_path):
    run = trained_run(tmp_path)
    with pytest.raises(ConfigError, match="--format is 'onnx'; accepted are peft, gguf-lora, gguf"):
        export_adapter(str(run), str(tmp_path / "out"), format="onnx", **QUIET)
    with pytest.raises(ConfigError, match="exists already"):
        export_adapter(str(run), str(run), base_id="Org/Base", **QUIET)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pgkd train --config /home/me/a.yaml --out=/data/x/run-1/ -q", "pgkd train --config a.yaml --out=run-1 -q"),
        ("--data ~/secret/rows.jsonl ./here/b.json ../c", "--data rows.jsonl b.json c"),
        ("--model Org/Name recipes/r.yaml 1/2", "--model Org/Name recipes/r.yaml 1/2"),
        ("see https://huggingface.co/Org/Name", "see https://huggingface.co/Org/Name"),
    ],
)
def test_paths_are_cut_to_their_last_name(text, expected):
    assert without_local_paths(text) == expected


class FakeHub(BaseHTTPRequestHandler):
    """Enough of the Hub's API to create a repository and commit small files to it."""

    commits: dict[str, dict[str, bytes]]
    forbidden: set[str]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_test":
            return self.answer(401, {"error": "no token"})
        if self.path == "/api/repos/create":
            name = "me/" + json.loads(body)["name"].split("/")[-1]
            if name in self.forbidden:
                return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            self.commits[name] = {}
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if self.path == "/api/validate-yaml":  # of the model card
            assert yaml.safe_load(json.loads(body)["content"].split("---")[1])["pipeline_tag"]
            return self.answer(200, {"warnings": [], "errors": []})
        _, _, _, owner, name, action, *_ = self.path.split("/")
        repo = self.commits[f"{owner}/{name}"]
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        assert action.startswith("commit")
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                repo[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/{owner}/{name}/commit/1", "commitOid": "1" * 40})

    def do_GET(self):
        self.answer(404, {"error": "not found"})

    def answer(self, status: int, content: dict):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("Handler", (FakeHub,), {"commits": {}, "forbidden": {"me/secret"}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # only this loopback address is reached
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield handler
    server.shutdown()
    server.server_close()


def test_push_uploads_every_file_as_written(tmp_path, hub):
    run = trained_run(tmp_path)
    said: list[str] = []
    export_adapter(str(run), str(tmp_path / "out"), base_id="Org/Base", push_to_hub="me/adapter", log=said.append)
    assert hub.commits["me/adapter"] == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert any("me/adapter" in line for line in said)
    merge_adapter(str(run), str(tmp_path / "merged"), push_to_hub="me/merged", max_new_tokens=3, **QUIET)
    pushed = hub.commits["me/merged"]
    assert pushed == {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    (tmp_path / "again").mkdir()
    for name, content in pushed.items():
        (tmp_path / "again" / name).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template


def test_push_without_permission_says_so_and_keeps_the_result(tmp_path, hub):
    run = trained_run(tmp_path)
    with pytest.raises(ConfigError, match=r"--push-to-hub me/secret: .*The result stays in .*out; log in with"):
        export_adapter(str(run), str(tmp_path / "out"), base_id="Org/Base", push_to_hub="me/secret", **QUIET)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_push_of_one_gguf_file(tmp_path, hub):
    pytest.importorskip("gguf")
    from bpe import bpe_tokenizer

    run = trained_run(tmp_path)
    bpe_tokenizer().save_pretrained(run)
    (tmp_path / "unrelated.txt").write_text("stays here")
    export_adapter(str(run), str(tmp_path / "l.gguf"), format="gguf-lora", push_to_hub="me/gguf", **QUIET)
    assert hub.commits["me/gguf"] == {"l.gguf": (tmp_path / "l.gguf").read_bytes()}
