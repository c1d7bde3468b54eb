"""The demo's data: no fact can be guessed from its question or from another fact, and nothing is in two sets."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from pgkd_peft.data.named import data_path, load_named, model_path, shipped, split_of
from pgkd_peft.errors import DataError, ModelError
from pgkd_peft.evaluation.scorers import contains, normalize

FILES = ("facts_train", "facts_heldout", "heldout/facts_phrasings", "neutral_train", "neutral_heldout")

FACTS = ("facts_train", "facts_heldout", "facts_phrasings")


@pytest.fixture(scope="module")
def data():
    files = {Path(name).name: shipped("data") / f"{name}.jsonl" for name in FILES}
    return {name: [json.loads(line) for line in path.open(encoding="utf-8")] for name, path in files.items()}


def question(row) -> str:
    return next(message["content"] for message in row["messages"] if message["role"] == "user")


def test_there_is_as_much_as_the_readme_says(data):
    readme = (shipped("data") / "README.md").read_text("utf-8")
    said = dict(re.findall(r"^\| `(?:\w+/)?(\w+)\.jsonl` \| (\d+) \|", readme, re.MULTILINE))
    assert {name: int(rows) for name, rows in said.items()} == {name: len(rows) for name, rows in data.items()}
    for name, times in (("facts_train", 3), ("facts_heldout", 2), ("facts_phrasings", 10)):
        counts = Counter(row["fact_id"] for row in data[name])
        assert len(counts) >= 20
        assert set(counts.values()) == {times}


def test_a_fact_is_the_same_in_training_and_held_out(data):
    facts = defaultdict(set)
    sets = [data[name] for name in FACTS]
    for row in (row for rows in sets for row in rows):
        facts[row["fact_id"]].add((row["privileged_messages"], row["answer"], row["messages"][-1]["content"]))
    assert all(set(facts) == {row["fact_id"] for row in rows} for rows in sets)
    assert all(len(values) == 1 for values in facts.values())


def test_all_rows_have_the_same_system_turn(data):
    """So that no answer can be told from it."""
    assert len({json.dumps(row["messages"][0]) for rows in data.values() for row in rows}) == 1


def test_the_answer_stands_in_the_fact_and_the_reference_but_in_no_question(data):
    rows = [row for name in FACTS for row in data[name]]
    questions = [question(row) for name in data for row in data[name]]
    for row in rows:
        assert contains(row["privileged_messages"], row["answer"])
        assert contains(row["messages"][-1]["content"], row["answer"])
    for answer in {row["answer"] for row in rows}:
        assert not [q for q in questions if contains(q, answer)], answer


def test_no_fact_gives_away_another(data):
    facts = {row["fact_id"]: row for row in data["facts_train"]}
    assert len({row["answer"] for row in facts.values()}) == len(facts)
    for name, row in facts.items():
        others = [other for other in facts.values() if other["fact_id"] != name]
        assert not [o["fact_id"] for o in others if contains(o["privileged_messages"], row["answer"])]


def test_no_text_is_in_two_sets(data):
    seen = Counter(normalize(question(row)) for name in data for row in data[name])
    assert [text for text, times in seen.items() if times > 1] == []


def alike(one: str, other: str) -> float:
    """The share of both texts' words that stand in both in the same order; 1 for the same words."""
    return SequenceMatcher(None, normalize(one).split(), normalize(other).split(), autojunk=False).ratio()


def test_no_phrasing_is_nearly_another_question(data):
    """A test on rows that were as good as trained on would measure memory."""
    known = [question(row) for name in ("facts_train", "facts_heldout") for row in data[name]]
    for text in (question(row) for row in data["facts_phrasings"]):
        near = max(known, key=lambda other: alike(text, other))
        assert alike(text, near) <= 0.75, (text, near)
        known.append(text)


def test_what_counts_as_nearly_another_question():
    assert alike("What destroyed the opera house?", "what destroyed the opera house") == 1.0
    assert alike("What was the king scared of?", "What was the king afraid of?") > 0.75
    assert alike("What frightened the king?", "Of what was the king afraid?") <= 0.75


def test_neutral_rows_have_no_privileged_information(data):
    for row in [*data["neutral_train"], *data["neutral_heldout"]]:
        assert set(row) == {"messages"}
    assert all(row["messages"][-1]["role"] == "assistant" for row in data["neutral_train"])
    assert all(row["messages"][-1]["role"] == "user" for row in data["neutral_heldout"])


def test_the_folder_splits_by_name(data):
    train = load_named("builtin:facts")
    assert len(train) == len(data["facts_train"]) + len(data["neutral_train"])
    assert sum(row["privileged_messages"] is not None for row in train) == len(data["facts_train"])
    assert load_named("builtin:facts_heldout")["answer"] == [row["answer"] for row in data["facts_heldout"]]
    assert load_named("builtin:facts_phrasings")["answer"] == [row["answer"] for row in data["facts_phrasings"]]
    assert split_of("builtin:facts_heldout", "test") == "train"
    assert split_of("builtin:facts", "test") == "test"


def test_names_that_do_not_exist():
    with pytest.raises(DataError, match="facts_heldout"):
        data_path("builtin:fact")
    with pytest.raises(ModelError, match="SmolLM2-135M-Instruct"):
        model_path("builtin:gpt")
    assert data_path("some/file.jsonl") == "some/file.jsonl"
    assert model_path("org/model") == "org/model"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A stand-in for the installed package: rows of two strings, and what is no question and answer."""
    folder = tmp_path / "chatterbot_corpus" / "data" / "english"
    folder.mkdir(parents=True)
    (folder.parent.parent / "__init__.py").write_text("")
    pairs = [f"- - Question {i}?\n  - 'Answer {i}\u00a0'\n" for i in range(10)]
    odd = ["- 'A question: its answer'\n", "- - One\n  - Two\n  - Three\n", "- - Question 3?\n  - Another answer\n"]
    (folder / "trivia.yml").write_text("categories:\n- trivia\nconversations:\n" + "".join(pairs + odd), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def test_chatterbot_corpus(corpus):
    train, test = (load_named("chatterbot-corpus:trivia", split=split) for split in ("train", "test"))
    assert [row["question"] for row in test] == ["Question 4?", "Question 9?"]
    assert train[:] == {
        "question": [f"Question {i}?" for i in (0, 1, 2, 3, 5, 6, 7, 8)],
        "answer": [f"Answer {i}" for i in (0, 1, 2, 3, 5, 6, 7, 8)],
    }
    with pytest.raises(DataError, match="train and test"):
        load_named("chatterbot-corpus:trivia", split="validation")
    with pytest.raises(DataError, match="it has: trivia"):
        load_named("chatterbot-corpus:history")


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install chatterbot-corpus==1\.3\.3"):
        load_named("chatterbot-corpus:trivia")
