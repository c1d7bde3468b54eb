"""Every file of a run folder by its name, once. Imports nothing heavy: the command line reads it before torch."""

from __future__ import annotations

import re
from pathlib import Path

# What the run was told, and what it was trained on.
RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
HOLDOUT_FILE = "holdout.jsonl"
TRAINED_FILE = "trained_prompts.txt"

# What a bake writes beside them, and keeps when its training begins anew: people edit the questions.
QUESTIONS_FILE = "questions.jsonl"
ASKED_FILE = "asked.jsonl"
BAKE_FILE = "bake.json"
COVERAGE_FILE = "coverage.json"
BAKE_TRAIN_FILE = "bake_train.jsonl"
BAKE_HELDOUT_FILE = "bake_heldout.jsonl"
BAKE_NEUTRAL_FILE = "bake_neutral.jsonl"

# Logs, one line a record, each with its step.
METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
TRACE_FILE = "traces.jsonl"
FINAL_TRACE_FILE = "final_traces.jsonl"  # of the trained student, written whole at the end
STEP_FILES = (METRICS_FILE, COMPLETIONS_FILE, TRACE_FILE)

# What came of it.
SUMMARY_FILE = "summary.json"
RESULTS_FILE = "eval_results.json"
ANSWERS_FILE = "eval_answers.jsonl"
REPORT_FILE = "report.html"
CARD_FILE = "README.md"

# Names that PEFT and Transformers give.
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATES = "additional_chat_templates"  # a folder
TRAINING_ARGS = "training_args.bin"
STATE_FILE = "trainer_state.json"

# What a run uploads to the Hub: the adapter and what one needs to use it. Its logs, rows and traces hold the data and
# the PI, so nothing goes that is not named here (and by the tokenizer's own vocabulary files).
HUB_FILES = (
    *(ADAPTER_FILE, ADAPTER_CONFIG, CARD_FILE, "generation_config.json"),
    *(TOKENIZER_FILE, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *(CHAT_TEMPLATE, f"{CHAT_TEMPLATES}/*.jinja"),
)
# And of a checkpoint (hub_strategy), what training goes on from.
HUB_STATE_FILES = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", STATE_FILE),
    *("teacher.safetensors", "progress_*.json"),
)

# Where rollout servers load the adapter from; gone when training has ended.
ROLLOUT_FOLDER = ".rollout_adapter"

# In a checkpoint, beside those of Transformers.
TEACHER_FILE = "teacher.safetensors"
MANIFEST = "manifest.json"

# What a run leaves in its folder, so that --overwrite removes this and nothing else. The questions stay: people edit
# them.
RUN_FILES = (
    *(RUN_FILE, RECIPE_FILE, HOLDOUT_FILE, TRAINED_FILE, *STEP_FILES, FINAL_TRACE_FILE),
    *(SUMMARY_FILE, RESULTS_FILE, ANSWERS_FILE, REPORT_FILE, CARD_FILE),
    *(ADAPTER_FILE, ADAPTER_CONFIG, TOKENIZER_FILE, TOKENIZER_CONFIG, CHAT_TEMPLATE, TRAINING_ARGS),
)


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step}"


def is_checkpoint(name: str) -> bool:
    return re.fullmatch(r"checkpoint-\d+", name) is not None


def failed_batch_name(step: int) -> str:
    return f"failed_batch_step{step}.json"


def is_run_file(name: str) -> bool:
    """Whether a run has written a file of this name."""
    return name in RUN_FILES or re.fullmatch(r"failed_batch_step\d+\.json", name) is not None


def progress_name(rank: int) -> str:
    """Of the sums since the last log, which each rank keeps in a checkpoint."""
    return f"progress_{rank}.json"


def find_in_run(folder: Path, name: str) -> Path | None:
    """The file in an adapter's folder, or in the run folder above it when that is a checkpoint; None without one."""
    places = [folder, folder.parent] if is_checkpoint(folder.name) else [folder]
    return next((place / name for place in places if (place / name).is_file()), None)
