"""A golden run: five steps of a tiny model in float32, so that a change of numbers is seen, whatever caused it.

After a change that is meant to change them: `python tests/test_golden.py` writes golden.json; say in the commit why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden.json")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
CASES = {
    "references": {"lmbda": 0.0},
    "rollouts": {"lmbda": 1.0},
    "forward KL on rollouts, two a prompt": {"lmbda": 1.0, "beta": 0.0, "num_generations": 2},
}


def five_steps(folder: Path, settings: dict) -> list[dict[str, float]]:
    """Loss, gradient norm and tokens of each step."""
    from runs import make_trainer
    from tiny import save_tiny

    base = save_tiny(folder / "base")
    fixed = {"max_steps": 5, "logging_steps": 1, "save_strategy": "no", "rollout_log_steps": 0, "_dropout": 0.0}
    trainer = make_trainer(base, str(folder / "out"), settings={**fixed, **settings})
    trainer.train()
    steps = [log for log in trainer.state.log_history if "grad_norm" in log]
    return [{name: float(log[name]) for name in ("loss", "grad_norm", "loss_tokens")} for log in steps]


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_golden_run(name, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    now = {package: version(package) for package in PACKAGES}
    changed = {package: (golden["versions"][package], now[package]) for package in PACKAGES}
    changed = {package: pair for package, pair in changed.items() if pair[0] != pair[1]}
    steps = five_steps(tmp_path, CASES[name])
    assert len(steps) == 5
    for step, (seen, expected) in enumerate(zip(steps, golden["cases"][name]), start=1):
        assert seen == pytest.approx(expected, rel=1e-3), f"step {step}; versions that differ: {changed or 'none'}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    found = {}
    for case, options in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            found[case] = five_steps(Path(scratch), options)
    content = {"versions": {package: version(package) for package in PACKAGES}, "cases": found}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
