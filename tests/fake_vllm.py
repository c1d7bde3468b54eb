"""A stand-in for vLLM on 127.0.0.1 that speaks its protocol and is honest: it holds a model of its own, reads the
adapter files that it is sent, and decodes with them by whole-sequence forwards. Faults are asked for by name."""

from __future__ import annotations

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# What vLLM says, word for word where the trainer looks for it.
NO_LORA = "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA."
TOO_LARGE = "LoRA rank {} is greater than max_lora_rank {}."


class FakeVLLM:
    """Serves the model in `path`.

    Args:
        port: 0 takes a free one.
        max_lora_rank: 0 is a server without --enable-lora; None one without runtime updating.
        tokenizer: of /tokenize, if not the model's own.

    Attributes:
        ignore_adapter: from now on every answer comes from the base, whatever is asked for.
        ignore_loads: from now on adapters are taken, but the one that is there goes on answering.
        processed: log-probabilities are those after the temperature.
        die_at: number of the completion request at which the server is gone, without an answer.
        fail: numbers of completion requests that get the answer 503.
        default_stop: a token that it stops at by itself.
        requests: bodies of all completion requests; loads: of all adapter loads.
        most_at_once: requests that were open at one time.
    """

    def __init__(self, path: str, port: int = 0, *, max_lora_rank: int | None = 16, tokenizer: Any = None):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(path)
        self.path, self.max_lora_rank, self.max_model_len = path, max_lora_rank, 4096
        self.adapters: dict[str, PeftModel] = {}
        self.ignore_adapter = self.ignore_loads = self.processed = False
        self.die_at: int | None = None
        self.fail: set[int] = set()
        self.default_stop: int | None = None
        self.key: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.loads: list[dict[str, Any]] = []
        self.open = self.most_at_once = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.http.daemon_threads = True
        self.http.fake_is_dead = False
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def __enter__(self) -> FakeVLLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if not self.http.fake_is_dead:
            self.http.fake_is_dead = True
            self.http.shutdown()
            self.http.server_close()

    # ---- routes ------------------------------------------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        base = {"id": self.path, "root": self.path, "parent": None, "max_model_len": self.max_model_len}
        return {"data": [base, *({"id": name, "parent": self.path} for name in self.adapters)]}

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.max_lora_rank is None:
            return 404, {"detail": "Not Found"}
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters and not body.get("load_inplace"):
            return 400, error(f"The lora adapter '{name}' has already been loaded.")
        if self.max_lora_rank == 0:
            return 500, error(NO_LORA)
        if not (folder / "adapter_config.json").is_file():
            return 404, error(f"No adapter found for {name} at {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return 500, error(TOO_LARGE.format(rank, self.max_lora_rank))
        if not load_file(folder / "adapter_model.safetensors"):
            return 500, error("Call to add_lora method failed: Worker failed with error ''")
        self.loads.append(body)
        if self.ignore_loads and self.adapters:
            self.adapters[name] = list(self.adapters.values())[-1]
            return 200, "Success"
        self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.model), str(folder)).eval()
        return 200, "Success: added"

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        number = len(self.requests)
        self.requests.append(body)
        if self.die_at is not None and number >= self.die_at:
            threading.Thread(target=self.stop, daemon=True).start()
            return 0, None
        if number in self.fail:
            return 503, error("the engine is busy")
        name = body["model"]
        if name != self.path and name not in self.adapters:
            return 404, error(f"The model `{name}` does not exist.")
        model = self.model if name == self.path or self.ignore_adapter else self.adapters[name]
        return 200, self.decode(model, body)

    @torch.no_grad()
    def decode(self, model: Any, body: dict[str, Any]) -> dict[str, Any]:
        """Token by token, each from a forward of the whole sequence."""
        assert body["top_k"] == -1, body
        assert body["top_p"] == 1 == body["repetition_penalty"], body
        assert body["min_p"] == 0 == body["presence_penalty"] == body["frequency_penalty"], body
        stops = {*body["stop_token_ids"], self.default_stop}
        generator = torch.Generator().manual_seed(body["seed"])
        ids, logprobs = list(body["prompt"]), []
        reason = "length"
        for _ in range(body["max_tokens"]):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            temperature = body["temperature"]
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            given = logits / temperature if self.processed and temperature else logits
            logprobs.append(float(given.log_softmax(-1)[token]))
            ids.append(token)
            if token in stops:
                reason = "stop"
                break
        made = ids[len(body["prompt"]) :]
        tokens = [f"token_id:{token}" for token in made]
        return {
            "choices": [
                {
                    "index": 0,
                    "text": self.tokenizer.decode(made),
                    "token_ids": made,
                    "prompt_token_ids": body["prompt"],
                    "logprobs": {"tokens": tokens, "token_logprobs": logprobs},
                    "finish_reason": reason,
                }
            ]
        }

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, self.models()
        assert body is not None
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/v1/load_lora_adapter":
            return self.load(body)
        if path == "/v1/unload_lora_adapter":
            return (200, "Success") if self.adapters.pop(body["lora_name"], None) else (404, error("cannot be found"))
        if path == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "Error", "code": 0}}


def _handler(fake: FakeVLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any] | None) -> None:
            fake.open += 1
            fake.most_at_once = max(fake.most_at_once, fake.open)
            try:
                if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                    status, said = 401, {"error": "Unauthorized"}
                else:
                    with fake.lock:
                        status, said = (0, None) if fake.http.fake_is_dead else fake.answer(self.path, body)
            finally:
                fake.open -= 1
            if not status:
                self.close_connection = True
                return
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
