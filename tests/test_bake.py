"""`pgkd bake`: splitting, asking a server, keeping, going on after a kill, and what a user gets wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model_state_dict
from runs import context
from safetensors.torch import load_file
from tiny import STRICT, byte_tokenizer, save_tiny

from pgkd_peft import DataCollatorForPrivilegedGKD, cli
from pgkd_peft.bake import ask, coverage, pipeline, read
from pgkd_peft.bake.keep import SYSTEMS, Keeper, systems_of
from pgkd_peft.bake.questions import Question, read_questions, write_questions
from pgkd_peft.bake.server import ServerWriter, WriterError
from pgkd_peft.bake.split import Passage, asked_in, rules, sentences, split_documents, word_count
from pgkd_peft.errors import DataError, ModelError

DOCUMENT = """# Harbour

The lighthouse at Ammersby is violet. It was built in 1911.

## Staff

- The keeper is Ilsa Vorrenmark.
- Her dog is called Pepper.
"""


# ---- splitting -----------------------------------------------------------------------------------------------------


def test_passages_carry_their_headings_and_nothing_is_lost():
    passages = split_documents([("a.md", DOCUMENT)])
    assert [p.headings for p in passages] == [("Harbour",), ("Harbour", "Staff")]
    assert passages[0].privileged == "Harbour\nThe lighthouse at Ammersby is violet. It was built in 1911."
    assert "Pepper" in passages[1].text
    assert [p.number for p in passages] == [0, 1]


def test_long_paragraphs_are_cut_between_sentences_and_every_word_stays():
    sentences = [f"The house number {i} belongs to Mr. Smith and his {i} cats." for i in range(30)]
    passages = split_documents([("a.txt", " ".join(sentences))], most_words=25)
    assert len(passages) > 10
    assert all(len(p.text.split()) <= 25 for p in passages)
    assert " ".join(p.text for p in passages).split() == " ".join(sentences).split()


def test_lists_are_cut_between_items_and_code_stays_whole():
    items = "\n".join(f"- item {i} weighs {i} kilograms in all\n  and is red" for i in range(12))
    passages = split_documents([("a.md", items)], most_words=30)
    assert all(p.text.startswith("- item") for p in passages)
    assert "".join(p.text for p in passages).count("and is red") == 12
    code = "```\nfirst = 1 + 1 + 1\n\nsecond = first * 2\n```"
    (passage,) = split_documents([("a.md", code)])
    assert "first" in passage.text
    assert "second" in passage.text


def test_a_lead_in_joins_what_it_introduces():
    (passage,) = split_documents([("a.md", "The rules of the house are:\n\n- No smoking after nine o'clock.")])
    assert passage.text.startswith("The rules")
    assert "smoking" in passage.text


FAQ = """Questions about the ferry
=========================

Q. I am late. Does the ferry wait?

A. No. It leaves at nine.

The next one leaves at noon.

**Q: What does a bicycle cost?**

A: Two crowns.

Q: Who pays for my children?
A: They travel free.

Prices
------

### Who sells the tickets here?

Ask Berta.
"""


def test_questions_of_a_document_stand_above_their_answers_and_are_asked():
    passages = split_documents([("faq.txt", FAQ)])
    title, late = "Questions about the ferry", "Q. I am late. Does the ferry wait?"
    assert [(p.headings, p.text) for p in passages] == [
        ((title, late), "A. No. It leaves at nine."),
        ((title, late), "The next one leaves at noon."),
        ((title, "**Q: What does a bicycle cost?**"), "A: Two crowns."),
        ((title,), "Q: Who pays for my children?\nA: They travel free."),
        ((title, "Prices", "Who sells the tickets here?"), "Ask Berta."),
    ]
    found = [(question, passage.number) for question, passage in asked_in(passages)]
    assert found == [
        ("I am late. Does the ferry wait?", 0),
        ("What does a bicycle cost?", 2),
        ("Who pays for my children?", 3),
        ("Who sells the tickets here?", 4),
    ]


def test_a_question_that_nothing_follows_is_kept_as_text():
    passages = split_documents([("a.md", "The tower is red.\n\nWho built it all?\n\n# Next\n\nIt is blue and tall.")])
    assert [p.text for p in passages] == ["The tower is red.", "Who built it all?", "It is blue and tall."]


def test_scripts_without_spaces_are_counted_by_letters():
    assert word_count("The tower is red.") == 4
    assert word_count("灯塔是紫色的。") == 3
    assert word_count("หอไฟสีม่วง") == 4  # the marks above and below are no letters
    sentence = "安默斯比的灯塔是紫色的，建于一九一一年。"
    passages = split_documents([("a.txt", f"{sentence}\n\n{sentence * 12}")], most_words=30)
    assert [p.text.count("。") for p in passages] == [1, *[3] * 4]
    assert "".join(p.text for p in passages) == sentence * 13
    asked = "安默斯比的灯塔是什么颜色的？"
    (passage,) = split_documents([("a.txt", f"{asked}\n\n{sentence}")])
    assert passage.headings == (asked,)
    assert asked_in([passage]) == [(asked, passage)]


def test_cutting_between_sentences_loses_no_quotation_mark():
    assert sentences('He said "Go." Then he left. (It was late.) She stayed.') == [
        'He said "Go." ',
        "Then he left. ",
        "(It was late.) ",
        "She stayed.",
    ]


def test_a_line_of_tildes_under_a_title_is_no_fence():
    text = "Harbour\n~~~~~~~\n\nThe tower is red.\n\nThe pier is blue.\n\nRun this\n~~~\na = 1\n\n# b = 2\n~~~\n"
    passages = split_documents([("a.rst", text)])
    assert [(p.headings, p.text) for p in passages] == [
        (("Harbour",), "The tower is red."),
        (("Harbour",), "The pier is blue."),
        (("Harbour",), "Run this\n~~~\na = 1\n\n# b = 2\n~~~"),
    ]


def test_code_and_tables_are_cut_at_line_ends():
    code = ["```", *(f"    x{i} = {i}. And" for i in range(12)), "", "- y", "- z", "```"]
    table = [f"| row {i} | It weighs {i} kilograms. |" for i in range(12)]
    prose = ["It is red. It is", "old."]
    for lines in (code, table, [*prose, *code], ["- one", *code, "- two"]):
        passages = split_documents([("a.md", "\n".join(lines))], most_words=20)
        assert len(passages) > 2
        assert all(any(char.isalnum() for char in p.text) for p in passages)
        found = "\n".join(p.text for p in passages)
        assert [line for line in found.split("\n") if line] == [
            line for line in "\n".join(lines).replace("is\nold", "is old").split("\n") if line
        ]


def test_a_heading_with_nothing_below_is_a_statement_or_named(caplog):
    text = "# Rules\n\n## No refunds after May\n\n## Pets\n\n### Cats\n\n## Is it free?\n\n## Dogs\n\n"
    text += "Dogs may stay outside."
    found = [(p.headings, p.text) for p in split_documents([("a.md", text)])]
    assert found == [
        (("Rules",), "No refunds after May"),
        (("Rules",), "Is it free?"),
        (("Rules", "Dogs"), "Dogs may stay outside."),
    ]
    assert "a.md: headings with nothing below them are left out: Rules > Pets > Cats." in caplog.text
    comments = "# The server listens on port 8080\n# Never change it in the code\nport = 8080, host = here\n"
    first, second = split_documents([("a.ini", comments)])
    assert (first.text, second.headings) == ("The server listens on port 8080", ("Never change it in the code",))


@pytest.mark.parametrize(
    "code",
    [
        "````md\n```python\n# one\n# two\n```\n# three\n````",
        "```\na = 1\n```python\n# one\n# two\n```",
        "~~~~\n~~~\n# one\n# two\n~~~~",
        "```\n~~~\n# one\n# two\n```",
    ],
)
def test_a_fence_is_closed_by_its_like_alone(code):
    passages = split_documents([("a.md", f"It is in the code below.\n\n{code}\n\nIt ends with the code.")])
    assert [p.text for p in passages] == ["It is in the code below.", code, "It ends with the code."]
    inline = split_documents([("a.md", "```a``` is code on one line.\n\n# Heading\n\nIt stands below the heading.")])
    assert inline[1].headings == ("Heading",)


@pytest.mark.parametrize(
    "text",
    [
        " ".join(["बंदरगाह का प्रकाशस्तंभ बैंगनी है।"] * 12),
        " ".join(["بندرگاہ کا مینار جامنی ہے۔"] * 12),
        " ".join(["ประภาคารเป็นสีม่วงและสูง"] * 12),
        "\n".join(["a line of a transcript without any marks"] * 12),
        "\n".join(["ann | 3 days | of leave in may"] * 12),
    ],
)
def test_text_is_cut_where_its_script_or_its_lines_end_sentences(text):
    passages = split_documents([("a.md", text)], most_words=20)
    assert len(passages) > 2
    assert max(word_count(p.text) for p in passages) <= 20
    assert " ".join(p.text for p in passages).split() == text.split()


def test_words_at_the_end_of_a_cut_item_stay_apart():
    lines = ["```", *(f"x{i} = {i}" for i in range(12)), "```", "It is the last word", "- one", "- two"]
    passages = split_documents([("a.md", "\n".join(lines))], most_words=10)
    assert "\n".join(p.text for p in passages).split() == " ".join(lines).split()


@pytest.mark.parametrize("line", ["---", "==="])
def test_a_line_under_a_heading_is_no_heading(line):
    text = f"# Harbour\n{line}\nThe tower is red.\n\n```\na = b\n\n```\n{line}\n\nIt is old and tall."
    passages = split_documents([("a.md", text)])
    assert {p.headings for p in passages} == {("Harbour",)}
    assert "The tower is red." in passages[0].text


def test_a_prompt_is_split_into_its_rules():
    assert rules("Be brief.\nNever use lists.") == ["Be brief.", "Never use lists."]
    assert rules("Be brief. Never use lists.") == ["Be brief.", "Never use lists."]
    prompt = "Be brief.\n\n- Never use lists,\n  nor tables.\n- Be kind.\n\nUser: Hello.\nAssistant: Hi.\n"
    parts = ["Be brief.", "- Never use lists,\n  nor tables.", "- Be kind.", "User: Hello.\nAssistant: Hi."]
    assert rules(prompt) == parts


# ---- questions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        ("What colour is the lighthouse at Ammersby?", ""),
        ("What does the text say about the lighthouse?", "speaks of the text"),
        ("Who is it?", "names nothing of its passage"),
        ("Why?", "no question"),
        ("what colour is the Lighthouse at ammersby", "duplicate"),
    ],
)
def test_questions_that_are_no_use(question, fault):
    passage = split_documents([("a.md", DOCUMENT)])[0]
    seen = {ask.normal("What colour is the lighthouse at Ammersby?")} if fault == "duplicate" else set()
    assert ask.fault_of(question, passage, seen) == fault


def test_questions_about_a_passage_without_names_or_long_words_are_kept(keeper):
    passage = Passage(0, "a.md", (), "It is red.")
    assert ask.fault_of("Is it red?", passage, ()) == ""
    keeper.privileged = {0: passage.text}
    assert keeper._fault(Question("What is it?", passage=0, answer="It is red."), True) == ""


@pytest.mark.parametrize(
    ("written", "question"),
    [
        ("<think>What? Two?\n</think>\n\nWho is there? Ann.", "Who is there?"),
        ("What? Two?\n</think>\nWho is there?", "Who is there?"),
        ("Who <think>it is", ""),
        ("灯塔是什么颜色的？是紫色的。", "灯塔是什么颜色的？"),
        ("ما لون المنارة؟ بنفسجي.", "ما لون المنارة؟"),
        ("说说灯塔。它很高", "说说灯塔。"),
    ],
)
def test_the_first_sentence_that_asks(written, question):
    assert ask.tidy(written) == question


def test_requests_of_three_to_forty_words_in_any_script():
    assert ask.tidy_request("请介绍一下\u3000北京的天气。") == "请介绍一下 北京的天气。"
    assert ask.tidy_request("好的。") == ""
    assert ask.tidy_request("天气" * 41) == ""
    assert ask.fault_of("谁？", None, ()) == "no question"
    assert ask.content_words("หอไฟ") == {"หอ", "อไ", "ไฟ"}


def test_each_round_has_another_opening_and_more_goes_on_behind_them():
    first = ask.rounds(12)
    assert len(set(first)) == 12
    assert ask.rounds(4, first=12) == ask.rounds(16)[12:]


def test_what_the_user_edits_is_read_and_what_is_wrong_named(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"question": "Who?", "passage": 1}\n\n{"question": "", "passage": 0}\n{"question": "x", "pasage": 0}\n'
    )
    with pytest.raises(DataError, match=r"(?s)line 3: question is empty.*line 4: unknown key 'pasage'"):
        read_questions(path, 2)
    path.write_text('{"question": "Who?", "passage": 7}\n')
    with pytest.raises(DataError, match="there are passages 0 to 1"):
        read_questions(path, 2)
    path.write_text('{"question": "Who is there?", "passage": 1, "use": "dropped"}\n')
    assert read_questions(path, 2) == [Question("Who is there?", passage=1, use="dropped")]


def test_a_line_of_questions_ends_at_a_line_feed_alone(tmp_path):
    path = tmp_path / "questions.jsonl"
    questions = [Question("Is one\u2028line two?", passage=0), Question("Is\x85it?", passage=0)]
    write_questions(path, questions)
    assert read_questions(path, 1) == questions
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_questions(path, 1) == questions
    path.write_bytes('{"question": "Grüße?"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"questions\.jsonl is no UTF-8 text .*save it as UTF-8"):
        read_questions(path, 1)


# ---- the keeper, against plain arithmetic --------------------------------------------------------------------------


@pytest.fixture
def keeper(make_trainer):
    trainer = make_trainer()
    return Keeper(trainer.model, trainer.data_collator, {0: "The lighthouse is violet."}, max_new_tokens=6)


def test_the_gap_is_the_difference_of_two_plain_log_probabilities(keeper, monkeypatch):
    import torch

    question = Question("What colour is the lighthouse?", passage=0)
    monkeypatch.setattr(keeper, "_fault", lambda question, ended: "")
    keeper.judge([question])
    encoded = keeper.collator.encode({"messages": question.messages(), "privileged_messages": keeper.privileged[0]})

    def greedy_and_log_p(prompt, answer=None):
        ids, total = list(prompt), 0.0
        for t in range(6 if answer is None else len(answer)):
            with torch.no_grad():
                logits = keeper.model(torch.tensor([ids])).logits[0, -1].double()
            token = int(logits.argmax()) if answer is None else answer[t]
            total += float(torch.log_softmax(logits, -1)[token])
            ids.append(token)
            if answer is None and token in keeper.stops:
                break
        return ids[len(prompt) :], total

    answer, told = greedy_and_log_p(encoded["teacher_ids"])
    _, untold = greedy_and_log_p(encoded["student_ids"], answer)
    assert question.gap == pytest.approx(told - untold, abs=2e-3)
    assert question.unsure == pytest.approx(-told / len(answer), abs=2e-3)


@pytest.mark.parametrize(
    ("gap", "unsure", "answer", "use", "why"),
    [
        (9.0, 0.1, "It is violet.", "train", ""),
        (0.5, 0.1, "It is violet.", "anchor", "without effect"),
        (9.0, 2.0, "It is violet.", "dropped", "the teacher guesses"),
        (9.0, 0.1, "The text says violet.", "dropped", "the answer speaks of the text"),
        (9.0, 0.1, "The lighthouse is one.", "dropped", "the answer says nothing new"),
        (9.0, 0.1, "It is a violet novel by Charles Dickens.", "dropped", "the answer says what does not stand there"),
        (9.0, 0.1, "", "dropped", "the teacher says nothing"),
    ],
)
def test_what_becomes_of_a_question(keeper, monkeypatch, gap, unsure, answer, use, why):
    monkeypatch.setattr(keeper, "_held_out", lambda question: False)
    question = Question("What colour is the lighthouse?", passage=0, gap=gap, unsure=unsure, answer=answer)
    keeper.decide(question, keeper._fault(question, True))
    assert (question.use, question.why) == (use, why)
    assert keeper._fault(question, False) == ("the answer does not end" if answer else "the teacher says nothing")
    by_hand = Question("What colour?", passage=0, gap=0.1, unsure=unsure, answer=answer, use="train")
    keeper.decide(by_hand, keeper._fault(by_hand, True))
    assert by_hand.use == ("train" if answer else "dropped")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("Red.", ""),
        ("Its door is red.", ""),
        ("Tea.", "the answer says nothing new"),
        ("It was not from there.", "the answer says nothing new"),
    ],
)
def test_short_words_inform_as_well(keeper, monkeypatch, answer, why):
    monkeypatch.setitem(keeper.privileged, 0, "The lighthouse of Harrow was painted violet, and the door is red.")
    question = Question("What colour is the door?", passage=0, gap=9.0, unsure=0.1, answer=answer)
    assert keeper._fault(question, True) == why


def test_an_edited_question_is_judged_again(keeper):
    question = Question("What colour is the lighthouse?", passage=0)
    assert keeper.needs_judging(question)
    keeper.judge([question])
    assert not keeper.needs_judging(question)
    question.question = "Which colour has the lighthouse?"
    assert keeper.needs_judging(question)


def test_a_prompt_is_measured_rule_by_rule(keeper):
    """Each rule alone is the PI of the same requests; a prompt of one rule is measured as a whole alone."""
    from pgkd_peft.view.report_coverage import coverage_section

    asked = [Question("Hello there?", passage=0, use=use) for use in ("heldout", "train")]
    prompt = Passage(0, "system prompt", (), "Be very brief.\nNever write lists.")
    found = coverage.rule_by_rule(keeper.model, keeper.collator, prompt, asked, max_new_tokens=4)
    assert [(rule["text"], len(rule["questions"])) for rule in found] == [
        ("Be very brief.", 2),
        ("Never write lists.", 2),
    ]
    assert found[0]["questions"][0]["teacher"] != found[1]["questions"][0]["teacher"]
    page = coverage_section({"passages": found[:1], "rules": found, "kind": "system prompt"})
    assert page.count("Never write lists.") == 1
    page = coverage_section({"passages": [{**found[0], "recovered": None}, {**found[1], "recovered": 0.25}]})
    assert "changes little" in page  # of a small change no share is told
    assert "25 %" in page
    alone = Passage(0, "system prompt", (), "Be very brief.")
    assert coverage.rule_by_rule(keeper.model, keeper.collator, alone, asked, max_new_tokens=4) == []


def test_shares_are_of_sums():
    import numpy as np

    base, teacher, student = np.array([10.0, 4.0]), np.array([2.0, 2.0]), np.array([6.0, 4.0])
    assert coverage.share(base, teacher, student, np.array([5.0, 5.0])) == pytest.approx(0.4)
    assert coverage.share(teacher, teacher, student, np.array([5.0, 5.0])) is None
    assert coverage.share(base, teacher, student, np.array([5.0, 5.0]), 6.0) is None  # 5 nats an answer
    found = {
        "passages": [{"number": 0, "recovered": 0.9}, {"number": 1, "recovered": 0.1}, {"number": 2, "recovered": None}]
    }
    assert coverage.pale(found) == [1, 2]


# ---- a server that writes ------------------------------------------------------------------------------------------


class Fake(BaseHTTPRequestHandler):
    """Speaks just enough of OpenAI's protocol: asks about the longest word of the text."""

    away = 0
    most = 0
    now = 0
    asked: list = []  # noqa: RUF012
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Fake.lock:
            Fake.now += 1
            Fake.most = max(Fake.most, Fake.now)
            Fake.asked.append(body)
            away, Fake.away = Fake.away, max(0, Fake.away - 1)
        text = body["messages"][1]["content"].split("Already asked:")[0]
        opening = re.search(r"Begin with '([^']*)'", body["messages"][0]["content"])[1]
        word = max(re.findall(r"\w+", text), key=len)
        said = f"{opening} the {word}, number {zlib.crc32(str(body['messages']).encode()) % 1000}?"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
        }
        self.send_response(503 if away else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())
        with Fake.lock:
            Fake.now -= 1

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Fake.away = Fake.most = Fake.now = 0
    Fake.asked = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()


def tasks(count: int) -> list[ask.Task]:
    passages = split_documents([("a.md", DOCUMENT)])
    return [ask.Task(passages[i % 2], "fact", "What is") for i in range(count)]


def test_the_server_writes_knowing_what_was_asked_within_a_bound(server):
    writer = ServerWriter(server, "any")
    written = writer.questions(tasks(30), {0: ["What is the earlier question?"]}, (0,))
    assert len(written) == 30
    assert all(text.startswith("What is the ") for text in written)
    assert Fake.most <= 8
    assert any("What is the earlier question?" in body["messages"][1]["content"] for body in Fake.asked)


def test_a_server_that_was_away_is_asked_again_and_one_that_stays_away_is_an_error(server):
    writer = ServerWriter(server, "any")
    writer.wait = 0.01
    Fake.away = 2
    assert len(writer.questions(tasks(2), {}, (0,))) == 2
    Fake.away = 1000
    with pytest.raises(WriterError, match="run the same command again"):
        writer.questions(tasks(1), {}, (0,))


# ---- the whole -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("bake") / "base")


def flags(base: str, out: Path, document: Path, server: str) -> list[str]:
    settings = {
        **{"model_name_or_path": base, "output_dir": str(out), "document": str(document)},
        **{"questions": "6", "anchors": "16", "writer_url": server, "writer_model": "any", "gap_filter": "false"},
        **{"max_new_tokens": "5", "max_steps": "4", "save_steps": "1", "logging_steps": "1"},
        **{"base_quantization": "none", "bf16": "false", "use_cpu": "true", "lora_target_modules": "q_proj"},
        **{"rollout_log_steps": "0", "disable_tqdm": "true"},
    }
    return ["bake", *(part for key, value in settings.items() for part in (f"--{key}", value))]


def child(argv: list[str], die: str | None) -> None:
    """Run the command, and kill this process at one of three places."""
    torch.set_num_threads(1)

    def after(owner, name: str, count: int) -> None:
        original, seen = getattr(owner, name), [0]

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapped)

    if die == "asking":
        after(pipeline, "append_lines", 1)
    elif die == "judging":
        pipeline.JUDGED_AT_ONCE = 8
        after(pipeline, "write_questions", 1)
    elif die == "training":
        from pgkd_peft import base_trainer

        after(base_trainer, "publish", 2)
    pipeline.JUDGED_AT_ONCE = 8
    raise SystemExit(cli.main(argv))


def call(argv: list[str], die: str | None = None) -> int:
    process = context().Process(target=child, args=(argv, die))
    process.start()
    process.join(240)
    assert process.exitcode is not None
    return process.exitcode


def test_a_bake_that_is_killed_three_times_ends_as_one_that_was_not(base, server, tmp_path):
    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call(flags(base, whole, document, server)) == 0
    results = {}
    for die in ("asking", "judging", "training"):
        assert call(flags(base, killed, document, server), die) == -signal.SIGKILL, die
        if die == "judging":
            results["after judging"] = (killed / "questions.jsonl").read_text()
    assert call(flags(base, killed, document, server)) == 0
    for name in ("questions.jsonl", "bake_train.jsonl"):
        assert (whole / name).read_text() == (killed / name).read_text(), name
    assert (whole / "adapter_model.safetensors").read_bytes() == (killed / "adapter_model.safetensors").read_bytes()
    found = json.loads((killed / "coverage.json").read_text())
    assert [p["number"] for p in found["passages"]] == [0, 1]
    assert any(p["questions"] for p in found["passages"])
    page = (killed / "report.html").read_text()
    assert "how much of it was taken over" in page
    assert "The lighthouse at Ammersby is violet." in page
    assert cli.main(flags(base, killed, document, server)) == 2  # finished


def test_a_dry_run_ends_at_the_questions_and_an_edit_counts(base, server, tmp_path, capsys):
    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    argv = flags(base, tmp_path / "run", document, server)
    assert cli.main([*argv, "--dry_run"]) == 0
    assert "asking: call 1 of about 2" in capsys.readouterr().out
    path = tmp_path / "run" / "questions.jsonl"
    questions = read_questions(path, 2)
    assert {q.use for q in questions} >= {"train"}
    assert not (tmp_path / "run" / "run.json").exists()
    asked = len(Fake.asked)
    state = json.loads((tmp_path / "run" / "bake.json").read_text())
    (tmp_path / "run" / "bake.json").write_text(json.dumps({**state, "asking": True}))  # as a kill leaves it
    assert cli.main([*argv, "--dry_run"]) == 0
    assert json.loads((tmp_path / "run" / "bake.json").read_text()) == state
    edited = [q for q in questions if q.use != "train"] + [q for q in questions if q.use == "train"][:3]
    lines = [json.dumps({"question": q.question, "passage": q.passage, "use": q.use}) for q in edited]
    lines.append(json.dumps({"question": "What colour is my own lighthouse?", "passage": 0, "use": "train"}))
    path.write_text("\n".join(lines) + "\n")
    assert cli.main([*argv, "--dry_run"]) == 0
    assert len(Fake.asked) == asked
    again = read_questions(path, 2)
    assert [q.question for q in again] == [q.question for q in edited] + ["What colour is my own lighthouse?"]
    assert again[-1].answer
    assert again[-1].use == "train"
    capsys.readouterr()
    document.write_text(DOCUMENT + "\nOne more sentence about the harbour.\n")
    assert cli.main(argv) == 2
    assert "a bake of another text" in capsys.readouterr().err
    document.write_text(DOCUMENT)
    other = tmp_path / "other"
    other.symlink_to(base)
    assert cli.main([*argv, "--model_name_or_path", str(other)]) == 2
    assert "another model" in capsys.readouterr().err
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert cli.main([*argv, "--overwrite", "--model_name_or_path", str(tmp_path / "no-such-model")]) == 2
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before  # nothing goes before the model is there


def test_more_is_asked_about_what_was_hard_to_ask_about(tmp_path):
    passages = split_documents([("a.md", "\n\n".join(f"The tower {name} is red." for name in ["Abc", "Bcd", "Cde"]))])
    plan = pipeline.Plan(questions=4, anchors=0)
    writer = SimpleNamespace(collator=DataCollatorForPrivilegedGKD(byte_tokenizer()))
    asking = pipeline.Asking(tmp_path, passages, None, writer, None, plan, pipeline.Budget(), None)
    kind, first = asking.next_call(0, [])
    assert kind == "questions"
    assert Counter(task.passage.number for task in first) == {0: 4, 1: 4, 2: 4}
    asking.tried = Counter({0: 2, 1: 2, 2: 2})
    kept = [Question("?", passage=0, use="train"), Question("?", passage=0, use="heldout")]
    dropped = [Question("?", passage=1, use="dropped")]
    _, tasks = asking.next_call(1, [*kept, *dropped])
    assert Counter(task.passage.number for task in tasks) == {1: 3, 2: 3}
    assert [task.opening for task in tasks if task.passage.number == 1] == [o for _, o in ask.rounds(3, first=2)]
    asking.tried = Counter({0: 4, 1: 4, 2: 4})
    assert asking.next_call(2, []) == ("nothing", [])


def test_questions_are_asked_however_short_the_time_is(tmp_path, monkeypatch):
    """Three calls write anchors; the clock, which is over from the start, ends asking after the one behind them."""
    monkeypatch.setattr(pipeline, "judge", lambda folder, questions, keeper: questions)
    writer = SimpleNamespace(collator=DataCollatorForPrivilegedGKD(byte_tokenizer()))
    plan, budget = pipeline.Plan(questions=400, anchors=144), pipeline.Budget(seconds=1e-9)
    passages = split_documents([("a.md", DOCUMENT)])
    asking = pipeline.Asking(tmp_path, passages, writer, writer, None, plan, budget, lambda *_: None)
    asking._one = lambda kind, tasks, path, questions: [{"question": kind}]
    assert [question.question for question in asking.run([])] == ["anchors"] * 3 + ["questions"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The lighthouse at Port Ammersby is violet.", "Port Ammersby"),
        ("Since May the Lantern Fair of Sorrelby is held by Ann.", "May and Lantern Fair of Sorrelby"),
        ("It is violet.", "this"),
        ("Das Büro grüßt, als Frau Weiß über die Brücke geht.", "Büro and Frau Weiß"),
        ("Вчера маяк у Порта Амерсби горел.", "Порта Амерсби"),
        ("المنارة في المدينة بنفسجية.", "this"),
        ("등대는 보라색이고 높다.", "this"),
    ],
)
def test_what_to_ask_about_is_named(text, found):
    passage = split_documents([("a.md", text + " It stands there.")])[0]
    assert ask.subject(passage) == found
    first = found.split(" and ")[0]
    expected = "Who is it?" if found == "this" else f"{first}: Who is it?"
    assert ask.named("Who is it?", passage) == expected
    assert ask.named(f"Who was at {first}?", passage) == f"Who was at {first}?"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.md", b"  \n", "is empty"),
        ("binary.md", b"abc\0def", "binary"),
        ("utf16.txt", "Hello".encode("utf-16"), "UTF-16"),
        ("latin.txt", "Gr\xfc\xdfe aus der Stadt".encode("latin-1"), "no UTF-8 text"),
        ("table.xlsx", b"PK", "cannot be read"),
        ("only-headings.md", b"# One\n\n## Two\n", "no passage"),
    ],
)
def test_bad_documents_are_named_before_a_model_is_loaded(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    argv = ["bake", "--model_name_or_path", "no-such-model", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*argv, "--document", str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "give what to teach"),
        (["--document", "a", "--system_prompt", "b"], "not both"),
        (["--document", "no-such-file.md"], "does not exist"),
        (["--system_prompt", "no/such/prompt.md"], "does not exist"),
        (["--system_prompt", " "], "is empty"),
        (["--system_prompt", "Be brief.", "--questions", "0"], "questions is 0"),
        (["--system_prompt", "Be brief.", "--minutes", "nan"], "minutes is nan"),
        (["--system_prompt", "Be brief.", "--writer_url", "http://127.0.0.1:1/v1"], "belong together"),
        (
            ["--system_prompt", "Be brief.", "--writer_url", "http://127.0.0.1:1/v1", "--writer_model", "any"],
            "the model itself writes the requests",
        ),
        (["--system_prompt", "Be brief.", "--dataset_name", "rows.jsonl"], "dataset_name is for rows of your own"),
        (["--system_prompt", "Be brief.", "--requests", "no-such.txt"], "does not exist"),
        (["--system_prompt", "Be brief.", "--more"], "there is none"),
        (["--system_prompt", "Be brief.", "--more", "--overwrite"], "give one of them"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, capsys, given, words):
    argv = ["bake", "--model_name_or_path", "no-such-model", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*argv, *given]) == 2
    assert words in capsys.readouterr().err


def test_a_passage_longer_than_the_context_is_refused_by_name(base, tmp_path, capsys):
    document = tmp_path / "long.md"
    document.write_text("word " * 5000)
    argv = ["bake", "--model_name_or_path", base, "--output_dir", str(tmp_path / "out"), "--document", str(document)]
    assert cli.main([*argv, "--base_quantization", "none"]) == 2
    assert "passage 0 of long.md" in capsys.readouterr().err


def test_requests_and_edits_that_do_not_fit_are_refused_by_name(base, tmp_path, capsys):
    document, requests, run = tmp_path / "d.md", tmp_path / "r.txt", tmp_path / "run"
    document.write_text("The lighthouse at Ammersby is violet and tall.")
    requests.write_text("Is it violet?\n" + "Is it violet " * 1000 + "\n")
    argv = ["bake", "--model_name_or_path", base, "--document", str(document), "--base_quantization", "none"]
    argv += ["--dry_run", "--questions", "0", "--anchors", "0", "--max_length", "100000", "--output_dir", str(run)]
    assert cli.main([*argv, "--requests", str(requests)]) == 2
    said = capsys.readouterr().err
    assert "the request 'Is it violet Is it violet" in said
    assert "the model's context (max_position_embeddings) is" in said
    run.mkdir(exist_ok=True)
    (run / "questions.jsonl").write_text('{"question": "Is it \\ud800?", "passage": 0}\n')
    requests.write_text("Is it violet?\n")
    assert cli.main([*argv, "--requests", str(requests)]) == 2
    assert (
        "the question 'Is it \\ud800?' cannot be used: messages[0].content has a lone surrogate"
        in capsys.readouterr().err
    )
    prompt = ["--system_prompt", "Be brief. \udcff", "--model_name_or_path", "none", "--output_dir", str(run)]
    assert cli.main(["bake", *prompt]) == 2
    assert "--system_prompt has a lone surrogate" in capsys.readouterr().err
    prompt = ["--system_prompt", "Be brief. " * 900, "--model_name_or_path", base, "--output_dir", str(run / "p")]
    assert cli.main(["bake", *prompt, "--base_quantization", "none"]) == 2
    assert "of the model. Shorten it." in capsys.readouterr().err


def test_a_long_line_is_a_prompt_and_no_name_of_a_file(tmp_path):
    words = "Answer in one sentence. " * 20
    assert read.prompt_text(words) == words.strip()
    with pytest.raises(DataError, match="does not exist"):
        read.documents([words])
    with pytest.raises(DataError, match="does not exist"):
        read.requests(words)


def test_a_passage_is_measured_by_the_base_of_an_adapter(base, tmp_path, capsys):
    adapter, document = tmp_path / "adapter", tmp_path / "long.md"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    document.write_text("word " * 5000)
    argv = ["bake", "--model_name_or_path", str(adapter), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*argv, "--document", str(document), "--base_quantization", "none"]) == 2
    assert "passage 0 of long.md" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["questions", "client"])
def test_what_needs_no_model_is_told_before_one_is_loaded(base, tmp_path, capsys, monkeypatch, fault):
    from pgkd_peft.model import student

    monkeypatch.setattr(student, "build_student", lambda *args: 1 / 0)
    document, run = tmp_path / "doc.md", tmp_path / "run"
    document.write_text(DOCUMENT)
    if fault == "questions":
        run.mkdir()
        (run / "questions.jsonl").write_text('{"question": ""}\n')
    else:
        monkeypatch.setitem(sys.modules, "openai", None)
    assert cli.main(flags(base, run, document, "http://127.0.0.1:1/v1")) == 2
    assert ("question is empty" if fault == "questions" else "pgkd-peft[writer]") in capsys.readouterr().err


def test_own_requests_come_from_text_or_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("How are you?\n\nWho is there?\n")
    assert read.requests(str(tmp_path / "a.txt")) == ["How are you?", "Who is there?"]
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi there"}]}\n')
    assert read.requests(str(tmp_path / "a.jsonl")) == ["Hi there"]
    (tmp_path / "b.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="line 1"):
        read.requests(str(tmp_path / "b.jsonl"))
    line = '{"messages": [{"role": "user", "content": "%s"}]}\n'
    (tmp_path / "C.JSONL").write_text(line % "One\u2028request", encoding="utf-8-sig")
    assert read.requests(str(tmp_path / "C.JSONL")) == ["One\u2028request"]
    (tmp_path / "d.jsonl").write_text(line % "Hello" + line % " ")
    with pytest.raises(DataError, match="line 2: the request is empty"):
        read.requests(str(tmp_path / "d.jsonl"))


def test_own_requests_are_taken_as_they_are_written(tmp_path, caplog):
    (tmp_path / "a.md").write_text("# My requests\n\n- How are you?\n  Say it.\n2. Who is there?\n")
    assert read.requests(str(tmp_path / "a.md")) == ["How are you?\nSay it.", "Who is there?"]
    (tmp_path / "b.md").write_text("- How are you?\n\nAnd this?\n")
    with pytest.raises(DataError, match=r"b.md line 3: neither a list item"):
        read.requests(str(tmp_path / "b.md"))
    (tmp_path / "c.md").write_text("# Only a heading\n")
    with pytest.raises(DataError, match="holds no request"):
        read.requests(str(tmp_path / "c.md"))
    user, more = {"role": "user", "content": "And why?"}, [{"role": "user", "content": "Who?"}]
    parts = {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]}
    answer = {"role": "assistant", "content": "Ann."}
    turns = [[user], [*more, answer, user], [parts, answer]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    assert read.requests(str(tmp_path / "d.jsonl")) == ["And why?", "And why?", "Who is it?"]
    assert "1 of 3 requests have other turns before the last question" in caplog.text
    for line, why in (
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "stands twice"),
        (json.dumps({"messages": [{"role": "usr", "content": "a"}]}), "did you mean 'user'"),
        (json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "only text is supported"),
        (json.dumps({"prompt": "a"}), "in every line"),
    ):
        (tmp_path / "e.jsonl").write_text(line)
        with pytest.raises(DataError, match=f"e.jsonl, line 1: give .*{why}"):
            read.requests(str(tmp_path / "e.jsonl"))
    (tmp_path / "f.csv").write_text("Who?")
    with pytest.raises(DataError, match=r"\.csv cannot be read; accepted are .*\.jsonl"):
        read.requests(str(tmp_path / "f.csv"))


def test_pointers_are_no_text_to_teach(tmp_path):
    pointer = tmp_path / "a.md"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n")
    for reader in (lambda p: read.documents([p]), read.prompt_text, read.requests):
        with pytest.raises(ModelError, match="a Git LFS pointer"):
            reader(str(pointer))


@pytest.mark.parametrize("field", ["question", "kind", "system", "passage", "gap", "answer", "why", "call"])
def test_an_edit_of_another_type_is_named(tmp_path, field):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Who is it?", field: [True]}) + "\n")
    with pytest.raises(DataError, match=rf"line 1: {field} is \[True\]; it is "):
        read_questions(tmp_path / "q.jsonl", 3)
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "question": "Why?"}\n')
    with pytest.raises(DataError, match="'question' stands twice"):
        read_questions(tmp_path / "q.jsonl", 3)


def test_own_requests_go_to_the_nearest_passage_or_are_counted(tmp_path, caplog):
    passages = split_documents([("a.md", DOCUMENT)])
    plan = pipeline.Plan(
        questions=0, anchors=0, requests=["Tell me about the keeper, and what the dog is called", "Eh?"]
    )
    writer = SimpleNamespace(collator=DataCollatorForPrivilegedGKD(byte_tokenizer()))
    asking = pipeline.Asking(tmp_path, passages, writer, writer, None, plan, pipeline.Budget(), None)
    assert [question.passage for question in asking._own()] == [1]
    assert "1 of 2 requests" in caplog.text
    assert "'Eh?'" in caplog.text


def test_a_recipe_may_hold_both_kinds_of_settings(tmp_path):
    from pgkd_peft.cli.bake import parse

    recipe = tmp_path / "bake.yaml"
    recipe.write_text("document: [a.md, b.md]\nquestions: 7\nbeta: 0.5\nmodel_name_or_path: M\n")
    args, rest = parse(["--config", str(recipe), "--questions", "9"])
    assert args.document == ["a.md", "b.md"]
    assert args.questions == 9
    assert rest.count("--beta") == 1
    assert rest[rest.index("--beta") + 1] == "0.5"


def test_a_flag_counts_however_it_is_written(tmp_path):
    from pgkd_peft.cli.arguments import parse_train
    from pgkd_peft.cli.bake import parse

    recipe = tmp_path / "bake.yaml"
    recipe.write_text("output_dir: from-recipe\nmax_completion_length: 64\ngap_filter: true\ndry_run: false\n")
    argv = [
        "--config",
        str(recipe),
        "--model-name-or-path",
        "M",
        "--output-dir=given",
        "--lr-scheduler-type",
        "constant",
    ]
    argv += ["--document", "a.md", "--document=b.md", "--dry-run", "--no-gap-filter", "--writer-url", "u"]
    args, rest = parse([*argv, "--writer_model", "m", "--overwrite", "false"])
    assert (args.document, args.dry_run, args.gap_filter, args.writer_url) == (["a.md", "b.md"], True, False, "u")
    data, _, config = parse_train([*rest, "--dataset_name", "bake"], prog="pgkd bake")
    assert (config.output_dir, config.max_new_tokens, config.lr_scheduler_type) == ("given", 64, "constant")
    assert not data.overwrite
    _, rest = parse(
        ["--system-prompt", "- Be brief.", "--max-new-tokens", "9", "--teacher_prompt_template", "{prompt}"]
    )
    assert rest.count("--max_new_tokens") == rest.count("--privileged_template") == 1


def test_a_template_that_hides_the_user_s_turn_has_no_opening(make_trainer):
    trainer = make_trainer()
    writer = ask.BaseWriter(trainer.model, trainer.data_collator)
    opening = trainer.processing_class.decode(writer.user_opening())
    assert opening.endswith("user\n")
    assert Passage(0, "a", ("H",), "text").privileged == "H\ntext"


def test_a_training_that_is_slower_than_measured_ends_in_time(base, server, tmp_path, capsys, monkeypatch):
    """The clock runs out while training: what there is then is judged and kept."""
    from pgkd_peft.cli import bake_training as command

    monkeypatch.setattr(command, "steps_that_fit", lambda *args: 4)
    monkeypatch.setattr(command, "SHARE_OF_TRAINING", 0.0)
    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    argv = flags(base, tmp_path / "run", document, server)
    at = argv.index("--max_steps")
    assert cli.main([*argv[:at], *argv[at + 2 :], "--minutes", "30"]) == 0
    assert "stopped after step 1 of 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 1
    assert (tmp_path / "run" / "coverage.json").is_file()


def test_the_base_is_loaded_once_and_measuring_a_step_leaves_no_trace(base, server, tmp_path, monkeypatch):
    from pgkd_peft.cli import bake_training as command
    from pgkd_peft.model import student

    monkeypatch.setattr(command, "LEAST_STEPS", 7)
    monkeypatch.setattr(command, "EPOCHS", 0.1)
    loads, load = [], student.load_base
    monkeypatch.setattr(student, "load_base", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs))
    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    for name, more in (("timed", ["--minutes", "60"]), ("free", [])):
        argv = flags(base, tmp_path / name, document, server)
        at = argv.index("--max_steps")
        assert cli.main([*argv[:at], *argv[at + 2 :], *more, "--dtype", "float32"]) == 0
        info = json.loads((tmp_path / name / "run.json").read_text())
        assert (info["steps"], info["config"]["model_init_kwargs"]) == (7, {"dtype": "float32"})
    assert len(loads) == 2
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("timed", "free")]
    assert adapters[0] == adapters[1]


def test_what_was_trained_but_not_judged_is_judged_by_the_next_call(base, server, tmp_path, monkeypatch):
    from pgkd_peft import PrivilegedSelfDistillTrainer

    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(coverage, "measure", lambda *args, **kwargs: 1 / 0)
        assert cli.main(flags(base, run, document, server)) != 0
    adapter, info = (run / "adapter_model.safetensors").read_bytes(), (run / "run.json").read_text()
    assert not (run / "coverage.json").exists()
    with (run / "questions.jsonl").open("a") as file:
        for number in range(3):
            file.write(json.dumps({"question": f"What is {number} plus two?", "use": "heldout"}) + "\n")
    monkeypatch.setattr(PrivilegedSelfDistillTrainer, "train", lambda *args, **kwargs: 1 / 0)  # it is not trained again
    assert cli.main(flags(base, run, document, server)) == 0
    assert (run / "adapter_model.safetensors").read_bytes() == adapter
    assert (run / "run.json").read_text() == info
    drift = json.loads((run / "bake.json").read_text())["drift"]
    assert json.loads((run / "eval_results.json").read_text())["drift"] == drift > 0
    assert f"Drift on neutral prompts: {drift:.4f}" in (run / "README.md").read_text()
    for name in ("coverage.json", "report.html"):
        assert (run / name).is_file(), name
    assert cli.main(flags(base, run, document, server)) == 2  # finished


def test_more_goes_on_from_the_newest_and_stops_where_a_bake_does(base, server, tmp_path, monkeypatch, capsys):
    from pgkd_peft.cli import bake as command

    document, own = tmp_path / "doc.md", tmp_path / "own.txt"
    document.write_text(DOCUMENT)
    own.write_text("What colour is my lighthouse at Ammersby?\n")
    run = tmp_path / "run"
    argv = flags(base, run, document, server)
    assert cli.main(argv) == 0
    pale = {"passages": [{"number": 0, "recovered": 0.1}, {"number": 1, "recovered": 0.9}]}

    def finish(folder):
        for name, content in (("run.json", {"finished": True}), ("coverage.json", pale)):
            (folder / name).write_text(json.dumps(content))
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).write_bytes((run / name).read_bytes())

    finish(run)
    trained = []

    def train(*args):
        learnt = load_file(run / "adapter_model.safetensors")
        starts_with = get_peft_model_state_dict(args[4])
        assert learnt.keys() == starts_with.keys()
        assert all(torch.equal(learnt[name], starts_with[name]) for name in learnt)
        trained.append(args)
        finish(args[0].folder)

    monkeypatch.setattr(command, "train_and_judge", train)
    assert cli.main([*argv, "--more", "--dry_run", "--requests", str(own)]) == 0
    assert not trained
    asked = read_questions(run / "more" / "questions.jsonl", 2)
    assert asked[0].question == own.read_text().strip()
    assert {q.passage for q in asked} == {None, 0}
    assert cli.main([*argv, "--more"]) == 2  # --requests is missing
    assert cli.main([*argv, "--more", "--requests", str(own)]) == 0
    assert cli.main([*argv, "--more"]) == 0
    assert [args[0].folder for args in trained] == [run / "more", run / "more-2"]
    for args, adapter in zip(trained, (run, run / "more")):
        at = len(args[1]) - 1 - args[1][::-1].index("--model_name_or_path")
        assert args[1][at + 1] == str(adapter)
        assert "--lora_target_modules" not in args[1]
    assert own.read_text().strip() in [q.question for q in trained[1][2]]
    assert "--lora_target_modules: left aside" in " ".join(capsys.readouterr().out.split())
    document.write_text(DOCUMENT + "\nOne more sentence about the harbour.\n")
    assert cli.main([*argv, "--more"]) == 2
    assert "another text" in capsys.readouterr().err


def test_a_run_that_is_no_bake_is_left_alone(base, tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "doc.md").write_text(DOCUMENT)
    assert cli.main(flags(base, tmp_path, tmp_path / "doc.md", "http://127.0.0.1:1/v1")) == 2
    assert "holds a run that is no bake" in capsys.readouterr().err


def test_requests_for_a_prompt_are_written_where_the_template_has_no_system_turn(monkeypatch):
    tokenizer = byte_tokenizer(STRICT)
    writer = ask.BaseWriter.__new__(ask.BaseWriter)
    writer.collator = DataCollatorForPrivilegedGKD(tokenizer, privileged_placement="system")
    prompts = []
    monkeypatch.setattr(writer, "write", lambda asked, *args, **kwargs: prompts.extend(asked) or [], raising=False)
    ask.for_prompt("Be brief.", writer, 4, (0,))
    assert tokenizer.decode(prompts[0]).endswith("user\nBe brief.\n\n")


def test_anchors_of_a_prompt_stand_under_another_system_turn(tmp_path):
    passages = [Passage(0, "system prompt", (), "Be brief.")]
    found = pipeline.sift([Question("What is rain?"), Question("What is snow?", passage=0)], passages, is_prompt=True)
    assert found[0].system in SYSTEMS[1:]
    assert found[1].system is None
    strict = DataCollatorForPrivilegedGKD(byte_tokenizer(STRICT))
    assert systems_of(strict) == (None,)
    plan = pipeline.Plan(questions=48, anchors=48, is_prompt=True)
    for collator, first in ((strict, "requests"), (DataCollatorForPrivilegedGKD(byte_tokenizer()), "anchors")):
        writer = SimpleNamespace(collator=collator)
        asking = pipeline.Asking(tmp_path, passages, None, writer, None, plan, pipeline.Budget(), None)
        assert asking.next_call(0, [])[0] == first


def test_a_folder_says_what_it_leaves_out(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    for name in ("a.md", "sub/a.md"):
        (tmp_path / name).write_text("The lighthouse is violet.")
    (tmp_path / "sub" / "table.xlsx").write_bytes(b"PK")
    assert [name for name, _ in read.documents([str(tmp_path)])] == ["a.md", str(Path("sub", "a.md"))]
    assert "sub/table.xlsx" in caplog.text
    assert "a.md," not in caplog.text


def test_a_folder_leaves_out_what_is_hidden_and_what_runs_have_written(tmp_path, caplog):
    notes = tmp_path / "notes"
    for name in ("a.md", "README.md", ".git/b.md", ".c.md", "run/README.md", "run/checkpoint-2/README.md", "sub/d.md"):
        (notes / name).parent.mkdir(parents=True, exist_ok=True)
        (notes / name).write_text("The lighthouse is violet.")
    (notes / "run" / "run.json").write_text("{}")
    found = [name for name, _ in read.documents([str(notes)])]
    assert found == ["README.md", "a.md", str(Path("sub", "d.md"))]
    assert "as they are no documents: .c.md, .git, run." in caplog.text
    (notes / "bake.json").write_text("{}")  # a bake into the folder of its documents
    assert [name for name, _ in read.documents([str(notes)])] == ["a.md", str(Path("sub", "d.md"))]
    assert [name for name, _ in read.documents([str(notes / ".git")])] == ["b.md"]


def test_html_is_read_with_its_headings(tmp_path):
    pytest.importorskip("markitdown")
    page = tmp_path / "a.html"
    page.write_text("<html><body><h1>Harbour</h1><p>The lighthouse at Ammersby is violet.</p></body></html>")
    (passage,) = split_documents(read.documents([str(page)]))
    assert (passage.headings, passage.text) == (("Harbour",), "The lighthouse at Ammersby is violet.")


def test_the_command_that_comes_next_names_the_text(tmp_path, monkeypatch):
    from pgkd_peft.cli.bake import BakeArguments, text_file
    from pgkd_peft.export.next_steps import after_training, next_lines

    monkeypatch.chdir(tmp_path)
    Path("the tone.md").write_text("Be brief.")
    assert text_file(BakeArguments(document=["the tone.md"])) == "the tone.md"
    assert text_file(BakeArguments(system_prompt="the tone.md")) == "the tone.md"
    for others in ({"system_prompt": "Be brief."}, {"document": ["the tone.md", "b.md"]}, {"document": ["a.pdf"]}):
        assert text_file(BakeArguments(**others)) is None
    told = next_lines(after_training("runs/a b", "the tone.md")).splitlines()
    assert told[0] == "Next:"
    assert told[1].startswith("  pgkd chat 'runs/a b' --privileged_file 'the tone.md'   # ")
    assert told[-1].startswith("  pgkd merge 'runs/a b' --out 'runs/a b-merged'   # ")
