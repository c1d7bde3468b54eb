"""Splitting a text, asking about it, and keeping what is worth training on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import STRICT, byte_tokenizer

from pgkd_peft import DataCollatorForPrivilegedGKD
from pgkd_peft.bake import ask, coverage, pipeline, read
from pgkd_peft.bake.keep import SYSTEMS, Keeper, systems_of
from pgkd_peft.bake.questions import Question, read_questions, write_questions
from pgkd_peft.bake.split import Passage, asked_in, rules, sentences, split_documents, word_count
from pgkd_peft.errors import DataError, ModelError

DOCUMENT = """# Harbour

The lighthouse at Ammersby is violet. It was built in 1911.

## Staff

- The keeper is Ilsa Vorrenmark.
- Her dog is called Pepper.
"""


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


@pytest.fixture
def keeper(make_trainer):
    trainer = make_trainer()
    return Keeper(trainer.model, trainer.data_collator, {0: "The lighthouse is violet."}, max_new_tokens=6)


def test_the_gap_is_the_difference_of_two_plain_log_probabilities(keeper, monkeypatch):

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


def test_a_long_line_is_a_prompt_and_no_name_of_a_file(tmp_path):
    words = "Answer in one sentence. " * 20
    assert read.prompt_text(words) == words.strip()
    with pytest.raises(DataError, match="does not exist"):
        read.documents([words])
    with pytest.raises(DataError, match="does not exist"):
        read.requests(words)


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


def test_a_template_that_hides_the_user_s_turn_has_no_opening(make_trainer):
    trainer = make_trainer()
    writer = ask.BaseWriter(trainer.model, trainer.data_collator)
    opening = trainer.processing_class.decode(writer.user_opening())
    assert opening.endswith("user\n")
    assert Passage(0, "a", ("H",), "text").privileged == "H\ntext"


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
