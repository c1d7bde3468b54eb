"""One source of numbers: what README, recipe headers and docs/ say is what the result files hold, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import figures  # noqa: E402
import pictures  # noqa: E402
import tables  # noqa: E402


def benchmark(name: str):
    """A script of tests/benchmarks as a module."""
    path = ROOT / "tests" / "benchmarks" / f"{name}.py"
    made = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


# ---- prose and results ---------------------------------------------------------------------------------------------


def test_prose_and_results_agree():
    changed, complaints = figures.differing()
    assert not complaints
    assert not changed, f"run: python docs/figures.py (differs: {', '.join(path.name for path in changed)})"


@pytest.mark.parametrize(
    ("text", "sentence", "expected"),
    [
        ("student 0.71 of them", "student {score:.2f} of", "student 0.78 of them"),
        ("it is 0.71.", "it is {score:.2f}", "it is 0.78."),
        ("# it\n# is 0.71, 0.72\n# and 0.73 here", "it is {three} here", "# it\n# is 0.1, 0.2\n# and 0.3 here"),
        ("it is 0.71 here", "it is {three} here", "it is 0.1, 0.2 and 0.3 here"),
        ("-0.71 to 1.2e-5 x", "{low:.1f} to {score:.2f} x", "-0.5 to 0.78 x"),
    ],
)
def test_a_sentence_is_filled_over_the_ends_of_lines(text, sentence, expected):
    complaints = []
    values = {"score": 0.775, "low": -0.5, "three": "0.1, 0.2 and 0.3"}
    assert figures.filled(text, [sentence], values, complaints) == expected
    assert figures.filled(expected, [sentence], values, complaints) == expected
    assert complaints == []


def test_a_sentence_that_is_gone_or_doubled_is_told():
    complaints = []
    figures.filled("nothing", ["it is {score:.2f}"], {"score": 1.0}, complaints)
    figures.filled("it is 1. it is 2.", ["it is {score:.2f}"], {"score": 1.0}, complaints)
    assert [complaint[:33] for complaint in complaints] == [
        "the sentence stands there 0 times",
        "the sentence stands there 2 times",
    ]


def test_a_block_is_made_anew(monkeypatch):
    monkeypatch.setitem(figures.BLOCKS, "two words", lambda: "| new |")
    text = "a\n<!-- numbers: two words -->\n| old |\n<!-- /numbers -->\nb\n"
    assert figures.filled(text, [], {}, []) == text.replace("old", "new")


def test_how_figures_are_written():
    assert tables.spread([3.14, 2.72], ".1f") == "2.7 to 3.1"
    assert tables.spread([3.14, 3.12], ".1f") == "3.1"
    assert tables.mean([1.0, 2.0], ".1f") == "1.5 (1.0 to 2.0)"
    assert tables.mean([1.0, 1.01], ".1f") == "1.0"
    assert tables.listing([1, 2, 3], ".0f") == "1, 2 and 3"
    assert tables.table(["", "x"], [["a", ""]]) == "| | x |\n|---|---|\n| a | |"


def uncovered(text: str, sentences: list[str]) -> list[str]:
    """The decimals and percentages of a text that no block and no sentence has."""
    text = figures._BLOCK.sub("", text)
    for sentence in sentences:
        text = figures.pattern(sentence).sub("", text)
    for other in NO_FIGURES:
        text = re.sub(other, "", text)
    return re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\w)|\d+ ?%", text)


NO_FIGURES = (
    r"(?s)```(?:bash|json|yaml|python)\n.*?\n```",
    r"(?s)## What others do.*?(?=\n## )",  # versions and facts about other packages
    r"`[^`\n]+`",
    r"(?:\btorch|\btransformers|Transformers|TRL|Python|Apache-|beta|MIT|BSD-\d|CC B[\w-]+)[ =-]?\d[\d.]*\+?",
    r"95 ?% interval",
    r"\bseeds? \d",
    r"(?:width|alt)=\"[^\"]*\"",
)
"""What is no measured figure: code, settings, versions, licences, the level of an interval."""


@pytest.mark.parametrize("page", ["README.md", "docs/measured.md"])
def test_no_figure_of_a_page_is_from_elsewhere(page):
    assert uncovered((ROOT / page).read_text("utf-8"), figures.SENTENCES[page]) == []


MEASURED = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if "# Measured" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_no_figure_in_a_recipe_s_header_is_from_elsewhere(path):
    header = re.match(r"(?:#.*\n)+", path.read_text("utf-8"))[0]
    assert uncovered(header, figures.SENTENCES[path.relative_to(ROOT).as_posix()]) == []


def test_a_figure_from_elsewhere_would_be_noticed():
    assert uncovered("recovered 0.5 with torch 2.13.0, of `beta: 0.1` 12 %", ["recovered {x:.2f} with {y}."]) == [
        "0.5",
        "12 %",
    ]


def test_the_notebook_trains_as_the_recipe_does():
    import yaml

    recipe = yaml.safe_load((ROOT / figures.FACTS).read_text("utf-8"))
    notebook = json.loads((ROOT / "examples" / "privileged_gkd_colab.ipynb").read_text("utf-8"))
    code = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    for name, key in (("STEPS", "max_steps"), ("LEARNING_RATE", "learning_rate")):
        (value,) = re.findall(rf'"PGKD_NOTEBOOK_{name}", ([\d.e-]+)\)', code)
        assert float(value) == recipe[key]
    for key in ("lmbda", "temperature", "max_new_tokens", "beta"):
        assert float(re.findall(rf'"{key}": ([\d.]+),', code)[0]) == recipe[key]


# ---- what is said of the package -----------------------------------------------------------------------------------


def test_one_python_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    least = project["project"]["requires-python"].removeprefix(">=")
    assert f"Python {least}+" in (ROOT / "README.md").read_text("utf-8")
    named = [c.rpartition(" ")[2] for c in project["project"]["classifiers"] if "Python :: 3." in c]
    assert named[0] == least
    assert project["tool"]["ruff"]["target-version"] == f"py{least.replace('.', '')}"
    assert project["tool"]["mypy"]["python_version"] == least
    said = re.compile(r"[Pp]ython ?(?:>=)?(3\.\d+)(?:\+| or newer| or later)")
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    assert {version for page in pages for version in said.findall(page.read_text("utf-8"))} == {least}


def test_no_address_with_a_stand_in():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    if not any(listed):
        pytest.skip("not a git checkout")
    texts = [ROOT / name for name in listed if name.endswith((".md", ".ipynb", ".py", ".toml", ".yaml", ".html"))]
    stand_in = re.compile(r"(?:github\.com|huggingface\.co|pypi\.org/project)/(?:OWNER|USER|ORG|YOUR|example)\b")
    assert [str(path) for path in texts if path.is_file() and stand_in.search(path.read_text("utf-8"))] == []


# ---- the picture ---------------------------------------------------------------------------------------------------


def run(seed, recovered, drift):
    return {
        "seed": seed,
        "recovered": recovered,
        "recovered_interval": [recovered - 0.1, recovered + 0.1],
        "drift": drift,
        "drift_interval": [drift * 0.8, drift * 1.2],
    }


def test_the_picture_has_a_mark_a_run_and_one_a_mean():
    svg = pictures.front({"pi": [run(0, 0.7, 0.1), run(1, 0.8, 0.12)], "sft@0.0005": [run(0, 0.9, 1.5)]})
    root = ET.fromstring(svg)
    circles = [
        c.attrib for c in root.iter("{http://www.w3.org/2000/svg}circle") if float(c.attrib["cy"]) > pictures.TOP
    ]
    means = [(float(c["cx"]), float(c["cy"])) for c in circles if c["r"] == "5.5"]
    assert (len(circles), len(means)) == (5, 2)
    (pi_x, pi_y), (sft_x, sft_y) = means
    assert pi_x < sft_x  # more drift: further right
    assert pi_y > sft_y  # more recovered: higher
    assert "0.0005" in svg
    ET.fromstring(pictures.front({}))


# ---- the benchmark that makes the lines ----------------------------------------------------------------------------


@pytest.fixture
def front():
    return benchmark("front")


def test_a_condition_changes_what_its_name_says(front):
    plain = front.settings(str(ROOT / figures.FACTS), "pi", [])
    assert plain["learning_rate"] == 2e-3
    assert {"seed", "output_dir"}.isdisjoint(plain)
    for condition, change in (
        ("sft@5e-4", {"control": "sft", "learning_rate": 5e-4}),
        ("takeover", {"teacher_takeover": 0.2}),
        ("offline", {"control": "offline"}),
    ):
        assert front.settings(str(ROOT / figures.FACTS), condition, []) == {**plain, **change}
    assert front.settings(str(ROOT / figures.FACTS), "pi", ["--max_steps", "7"]) == {**plain, "max_steps": 7}
    for condition, more in (("nothing", []), ("pi", ["--max_steps"])):
        with pytest.raises(SystemExit):
            front.settings(str(ROOT / figures.FACTS), condition, more)


def test_what_the_file_has_is_not_done_again(front, tmp_path, monkeypatch, capsys):
    trained = []

    def train(folder, recipe, told, seed):
        trained.append((told.get("control"), seed, told["max_steps"]))
        return folder

    monkeypatch.setattr(front, "train", train)
    judged = {"score": 0.5, "recovered": 0.5, "drift": 0.1}
    monkeypatch.setattr(front.Judge, "__call__", lambda self, folder: judged)
    results = tmp_path / "front.jsonl"
    usual = ["front.py", "--config", str(ROOT / figures.FACTS), "--results", str(results), "--out", str(tmp_path)]
    for argv in (
        ["--conditions", "pi"],
        ["--conditions", "pi", "sft", "--seeds", "0", "1"],
        ["--conditions", "pi", "--max_steps", "7"],
        ["--conditions", "pi", "--max_steps", "7"],
        ["--conditions", "pi", "--dataset_name", "builtin:facts_heldout"],
    ):
        monkeypatch.setattr(sys, "argv", [*usual, *argv])
        front.main()
    assert trained == [(None, 0, 110), ("sft", 0, 110), (None, 1, 110), ("sft", 1, 110), (None, 0, 7), (None, 0, 110)]
    assert len(front.read_lines(results)) == len(trained)


def test_the_drift_s_mean_is_over_tokens(front):
    mean, (low, high) = front.mean_of_tokens([(0.1, 10), (0.4, 30)])
    assert mean == pytest.approx((0.1 * 10 + 0.4 * 30) / 40)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.4)
