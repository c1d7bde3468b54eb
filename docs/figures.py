"""Figures in prose come from result files: fills README, recipe headers and docs/, and draws docs/front.svg.

    python docs/figures.py              # after new results: writes what differs
    python docs/figures.py --check      # only says what differs; exit code 1 if anything does (a test does the same)

A block (a whole table) stands between `<!-- numbers: NAME -->` and `<!-- /numbers -->` and is made anew by the function
that BLOCKS of tables.py has under that name. A sentence is found by its words: SENTENCES has it with a placeholder for
each figure; a line may end, also with the `#` of a comment, between any two words. Who changes the words changes them
here too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pictures import front
from tables import BLOCKS, FACTS, SIQA, figures, front_lines

ROOT = Path(__file__).resolve().parent.parent
FRONT_PICTURE = ROOT / "docs" / "front.svg"
_BLOCK = re.compile(r"(<!-- numbers: ([\w ]+) -->\n)(.*?)(<!-- /numbers -->)", re.DOTALL)

SENTENCES: dict[str, list[str]] = {
    "README.md": [
        "right answers on {demo_n} unseen phrasings of 20 facts: base {demo_base:.3f}, base with PI (teacher) "
        "{demo_teacher:.3f}, student {demo_student:.3f} recovered gap: {demo_recovered:.3f} (95% interval "
        "{demo_low:.2f} to {demo_high:.2f}, n={demo_n} in 20 groups, bootstrap) drift on 16 neutral prompts: "
        "{demo_drift:.4f} nats/token",
        "on held-out questions, from {terse_base:.2f} to {terse_score:.2f} (teacher {terse_teacher:.2f}); right "
        "answers stay where they were ({terse_right_base:.2f} and {terse_right_score:.2f})",
        "folder are enough: recovered {three_flags_recovered:.2f} (95 % interval {three_flags_low:.2f} to "
        "{three_flags_high:.2f}, n={three_flags_n}) at drift {three_flags_drift:.3f} after {three_flags_steps} steps "
        "in {three_flags_seconds} s, and {three_flags_phrasings_recovered:.2f} on {three_flags_phrasings_n} further "
        "phrasings",
        "recover {defaults_terse:.2f} and {defaults_siqa:.2f} of the gap with nothing",
        "forgets {sft_drift_times:.0f} times as much of everything else",
        "takes {step_pgkd} s, one of TRL's `SDFTTrainer` {step_sdft} s; a text",
        "a merge is {merge_kl} nats a token from the model",
    ],
    "docs/measured.md": [
        "base {siqa_base:.3f}, teacher {siqa_teacher:.3f}; right is an answer",
        "A run's own 95 % interval of the recovered gap reaches {siqa_reach:.2f} to either side.",
        "exactly one option in {siqa_names_names_one:.2f} of their answers (base {siqa_names_base_names_one:.2f}), and "
        "of those {siqa_names_right_of_those:.2f} are right",
        "(`asdiv_cpu`, n={asdiv_n}, seed 0) the student stays at {asdiv_score:.2f} right (base {asdiv_base:.2f}, "
        "teacher {asdiv_teacher:.2f})",
        "rollout {ours_rollout} s ({floor_rollout}: each token",
        "the teacher's pass {ours_teacher} s ({floor_teacher}; attention)",
        "student with the divergence {ours_student} s ({floor_student}; LoRA",
        "inside a step of the trainer it takes {trainer_times:.1f} times the processor time of the bare products "
        "(N=512, V=49,152), with a gradient error of {trainer_error:.1f} %",
        "{export_right:.0f} of 40 answers right before",
        "moves the base by {export_adapter:.2f} nats a token",
        "adapter peaks at {merge_gib:.1f} GiB of memory",
    ],
    "docs/vllm.md": [
        "In bf16 the bases differ by {vllm_floor:.3f}, the ten steps by {vllm_low:.3f} to {vllm_high:.3f}, and "
        "{vllm_same:.0f} % of the tokens of greedy answers come before the first that differs ({vllm_base:.0f} % where",
        "writes {vllm_server:.0f} tokens/s, our merged copy {vllm_merged:.0f}, the model with its adapter "
        "{vllm_adapter:.0f}",
    ],
    FACTS: [
        "{facts_seconds} s of training with one thread beside other work, {facts_gib:.1f} GiB",
        "on the 40 held-out questions base {facts_base:.3f}, teacher with PI {facts_teacher:.3f}, student "
        "{facts_scores} with seeds 0, 1, 2; recovered {facts_recovered}; drift {facts_drift} nats/token.",
    ],
    SIQA: [
        "{siqa_seconds} s of training with one thread beside other work, {siqa_gib:.1f} GiB",
        "Base {siqa_base:.3f}, teacher with PI {siqa_teacher:.3f}, student {siqa_scores} (recovered {siqa_recovered}; "
        "95% intervals reach {siqa_reach:.2f} to either side).",
        "it does in {siqa_names_names_one:.2f} of its answers (base {siqa_names_base_names_one:.2f}), and of those "
        "{siqa_names_right_of_those:.2f} are right (base {siqa_names_base_right_of_those:.2f}, chance "
        "{siqa_names_chance:.2f})",
    ],
    "recipes/asdiv_cpu.yaml": [
        "on the first {asdiv_n} held-out problems. Right: base {asdiv_base:.2f}, teacher with PI {asdiv_teacher:.2f}, "
        "student {asdiv_score:.2f}, recovered {asdiv_recovered:.2f} (95% interval {asdiv_low:.2f} to {asdiv_high:.2f})",
        "makes most use of the answer: {asdiv_wordings_this:.2f} right",
        'in one short sentence." {asdiv_wordings_calculation:.2f}, the answer alone after the problem '
        "{asdiv_wordings_answer_alone:.2f}, in the system turn {asdiv_wordings_system:.2f}; the base without it "
        "{asdiv_wordings_base:.2f}",
        "{asdiv_seconds_a_step} s a step, {asdiv_peak_gib} GiB",
    ],
    "recipes/chatterbot_terse.yaml": [
        "{terse_seconds} s of training, {terse_peak_gib} GiB",
        "on the {terse_n} held-out questions (every fifth). Answers of at most five words: base {terse_base:.2f}, "
        "teacher with PI {terse_teacher:.2f}, student {terse_score:.2f}, recovered {terse_recovered:.2f} (95% interval "
        "{terse_low:.2f} to {terse_high:.2f}). Right answers: base {terse_right_base:.2f}, teacher "
        "{terse_right_teacher:.2f}, student {terse_right_score:.2f}.",
        "the teacher is as terse ({terse_wordings_no_answer:.2f}) but guesses",
        "falls back into sentences ({terse_wordings_text_low:.2f} to {terse_wordings_text_high:.2f} terse)",
    ],
}
_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^}]*))?\}")
_GAP = re.compile(r"\s+(?:#\s+)?")
_FIGURE = r"([-\d](?:[-\d.,%\s#]|e-|to|and){0,60}?)(?!\d|\.\d)"


def pattern(sentence: str) -> re.Pattern[str]:
    """What finds a sentence whatever its figures are, over the ends of lines and comments."""
    literals = _PLACEHOLDER.sub("\0", sentence).split("\0")
    return re.compile(_FIGURE.join(_GAP.pattern.join(map(re.escape, re.split(r"\s+", part))) for part in literals))


def filled(text: str, sentences: Sequence[str], values: Mapping[str, Any], complaints: list[str]) -> str:
    """`text` with the figures of its blocks and sentences; what cannot be found is added to `complaints`."""
    for sentence in sentences:
        found = list(pattern(sentence).finditer(text))
        if len(found) != 1:
            complaints.append(f"the sentence stands there {len(found)} times: {sentence}")
            continue
        shown = [format(values[name], form or "") for name, form in _PLACEHOLDER.findall(sentence)]
        for i, new in reversed(list(enumerate(shown, start=1))):
            start, end = found[0].span(i)
            breaks, parts = _GAP.findall(text[start:end]), new.split(" ")
            if len(breaks) == len(parts) - 1:  # a line ends where it did
                new = "".join(part + gap for part, gap in zip(parts, [*breaks, ""]))
            text = text[:start] + new + text[end:]
    return _BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]]()}\n{block[4]}", text)


def all_texts() -> tuple[dict[Path, str], list[str]]:
    """Every file with figures as it should be, and what was not found."""
    values, complaints, texts = figures(), [], {}
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    with_figures = dict.fromkeys([*(ROOT / name for name in SENTENCES), *pages])
    for path in with_figures:
        name = path.relative_to(ROOT).as_posix()
        missing: list[str] = []
        texts[path] = filled(path.read_text(encoding="utf-8"), SENTENCES.get(name, ()), values, missing)
        complaints += [f"{name}: {what}" for what in missing]
    texts[FRONT_PICTURE] = front(front_lines())
    return texts, complaints


def differing() -> tuple[dict[Path, str], list[str]]:
    """The files that are not as they should be, with their new text, and what was not found."""
    texts, complaints = all_texts()
    old = {path: path.read_text(encoding="utf-8") if path.is_file() else "" for path in texts}
    return {path: text for path, text in texts.items() if old[path] != text}, complaints


def main(check: bool) -> int:
    changed, complaints = differing()
    for path, text in changed.items():
        print(path.relative_to(ROOT), "differs from the results" if check else "written")
        if not check:
            path.write_text(text, encoding="utf-8")
    for complaint in complaints:
        print(complaint)
    return 1 if complaints or (check and changed) else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
