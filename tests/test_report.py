"""The report: what is on the page is what is in the run folder; hostile text stays text; nothing is loaded."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from conftest import perturb
from tiny import ROWS

from pgkd_peft.cli.report import main
from pgkd_peft.errors import ConfigError
from pgkd_peft.rollout_log import append_traces, trace_rows
from pgkd_peft.rows import rows_of
from pgkd_peft.run.info import command_line
from pgkd_peft.run.jsonl import append_lines
from pgkd_peft.view.report import choose_traces, collect, read_metrics, read_results, write_report
from pgkd_peft.view.report_page import csp_hash, number, render, script_json
from pgkd_peft.view.report_plots import Course, gap_against_drift, gap_of_each, ticks
from pgkd_peft.view.words import inserted, spread

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u2028&amp;\x00'\""
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Tags, attributes, scripts and the text that a reader sees."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.text += data


def trace(step=1, text="ok", **changes):
    tokens = [text, "", "\n", " end"]
    top = [[[text, 0.75], ["b", 0.2]]] * 4
    return {
        "step": step, "prompt": f"<user>{text}<end><a>", "teacher_prompt": f"<user>{text}<end><user>PI<end><a>",
        "has_privileged": True, "truncated": False, "generated": True, "tokens": tokens,
        "divergence": [0.1, 0.0, 2.5, 0.3], "in_loss": [False, True, True, True], "student_p": [0.5] * 4,
        "teacher_p": [0.25] * 4, "student_top": top, "teacher_top": top, **changes,
    }  # fmt: skip


def fill(folder, text="fact"):
    """A run folder with everything in it; `text` wherever a run can put text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(
        json.dumps(
            {
                "base_model": text, "base_quantization": "nf4", "teacher_adapter": text, "divergence": text, "seed": 3,
                "command": text, "device": text, "seconds": 125, "config": {"max_steps": 3, text: text},
                "versions": {text: text}, "peak_memory_mib": {"process": 1234.5}, "adapter_parameters": 10,
                "adapter_bytes": 2**20, "dataset_rows": 4,
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    append_lines(
        folder / "metrics.jsonl",
        [{"step": i, "divergence": 1 / i, "seconds_rollout": 1.5, "note": text} for i in (1, 2, 3)]
        + [
            {"step": 2, "eval_divergence": 0.7, "eval_recovered": 0.4, "eval_base": 0.1, "eval_drift": 0.02},
            {"step": 3, "train_runtime": 5.0},
        ],
    )
    append_lines(folder / "traces.jsonl", [trace(1, text), trace(3, text), trace(3, text, has_privileged=False)])
    summary = {
        "base": 0.1, "teacher": 0.9, "student": 0.7, "recovered": 0.75, "recovered_interval": [0.5, 0.9],
        "recovered_interval_level": 0.95, "n": 48, "drift": 0.0123,
        "columns": {"base": {"length_tokens": 12.5, "truncated": 0.25, "hint_share": 0.0, "pi_overlap": None}},
        "controls": [{"name": text, "base": 0.1, "teacher": 0.2, "student": 0.1, "recovered": 0.0, "n": 48}],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    answers = {"base": text, "student": "yes", text: ""}
    append_lines(
        folder / "eval_answers.jsonl",
        [
            {"prompt": text, "privileged": text, "answers": answers, "scores": {"base": base, "student": student}}
            for base, student in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.0))
        ],
    )
    final = [trace(3, text, question=f"{text} {i}?", special=["<user>", "<end>"], held_out=True) for i in range(3)]
    append_lines(folder / "final_traces.jsonl", final)
    return folder


def test_nothing_is_loaded_and_no_text_is_markup(tmp_path):
    text = write_report(fill(tmp_path / "run", HOSTILE)).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"img", "link", "iframe", "object", "embed", "form", "base", "a"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [
        "application/json",
        None,
        None,
    ]
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]
    for script in page.scripts[1:]:
        assert csp_hash(script) in policy
        assert not re.search(
            r"innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttp", script
        )
    data = json.loads(page.scripts[0])
    assert data["traces"][0]["tokens"][0] == HOSTILE
    assert page.text.count("onerror=") >= 10  # shown as text: name, command, prompts, answers …


def test_the_page_says_what_the_folder_holds(tmp_path):
    page = Page(write_report(fill(tmp_path / "demo")).read_text(encoding="utf-8"))
    for wanted in (
        "demo",
        "0.75",
        "95% interval 0.50 to 0.90, n = 48",
        "0.0123",
        "2 min 5 s",
        "1,234 MiB",
        "12.5",
        "25%",
    ):
        assert wanted in page.text, wanted
    left = {a["class"].split()[-1]: a["style"] for t, a in page.tags if a.get("class", "").startswith("mark ")}
    assert left == {"base": "left:10.00%", "teacher": "left:90.00%", "student": "left:70.00%"}
    part = next(a["style"] for t, a in page.tags if a.get("class") == "part")
    assert part == "left:10.00%;width:60.00%"
    data = json.loads(page.scripts[0])
    assert [m["step"] for m in data["metrics"]] == [1, 2, 3]
    evaluated = {"eval_divergence": 0.7, "eval_recovered": 0.4, "eval_base": 0.1, "eval_drift": 0.02}
    assert data["metrics"][1] == {"step": 2, "divergence": 0.5, "seconds_rollout": 1.5, **evaluated}
    assert [t["step"] for t in data["traces"]] == [1, 3, 3]
    assert data["traces"][0]["teacher_prompt"] == ["<user>fact<end>", "<user>PI<end>", "<a>"]


def test_metrics_of_a_run_without_a_metrics_file(tmp_path):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        history = [{"step": i, "divergence": float(i)} for i in range(1, step + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert [m["step"] for m in read_metrics(tmp_path)] == list(range(1, 11))


def test_results_from_both_files_once_with_controls(tmp_path):
    numbers = {"base": 0.0, "teacher": 1.0, "student": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps({**numbers, "recovered": 0.5}))
    (tmp_path / "eval_results.json").write_text(json.dumps({**numbers, "student_with_pi": 1.0, "recovered": 0.5}))
    (tmp_path / "eval_shuffled.json").write_text(json.dumps({**numbers, "student": 0.1}))
    (tmp_path / "eval_broken.json").write_text("{")
    names = [result["name"] for result in read_results(tmp_path)]
    assert names == ["this run", "eval_shuffled"]
    assert read_results(tmp_path)[0]["student_with_pi"] == 1.0
    (tmp_path / "eval_results.json").write_text(json.dumps({**numbers, "controls": {"no PI": {"student": 0.0}}}))
    assert [result["name"] for result in read_results(tmp_path)] == ["this run", "no PI", "eval_shuffled"]


def test_a_run_that_was_judged_without_labels(tmp_path):
    nats = {"sentence": "78 % of what the PI changes was taken over", "by_group": [
        {"group": "moon", "n": 6, "recovered": 0.7, "interval": [0.5, 0.9]},
    ]}  # fmt: skip
    judged = {"recovered": None, "recovered_nats": 0.78, "recovered_nats_interval": [0.7, 0.85], "n": 40, "nats": nats}
    (tmp_path / "eval_results.json").write_text(json.dumps(judged))
    text = Page(render(collect(tmp_path))).text
    assert "recovered, in nats0.7895% interval 0.70 to 0.85" in text
    assert "Without labels: 78 % of what the PI changes was taken over." in text
    assert "No evaluation" not in text
    assert "moon n=6" in text
    assert "0.70 0.50 to 0.90" in text


def test_the_gap_while_training_where_nothing_was_evaluated_afterwards(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"seed": 0, "control": "shuffled"}))
    gaps = (0.1, 0.75, 0.5)
    append_lines(tmp_path / "metrics.jsonl", [{"step": i, "eval_recovered": gap} for i, gap in enumerate(gaps)])
    text = Page(render(collect(tmp_path))).text
    assert "recovered gap0.50while training; highest 0.75 at step 1" in text
    assert "control: shuffled" in text
    assert "shuffled: PI of other rows" in text


def test_controls_stand_in_both_tables(tmp_path):
    column = {"length_tokens": 12.5, "truncated": 0.0, "hint_share": 0.25, "pi_overlap": 0.5}
    numbers = {"base": 0.0, "teacher": 1.0, "recovered_interval": [0.1, 0.9], "n": 40}
    control = {**numbers, "student": 0.125, "recovered": 0.125, "drift": 0.0625, "columns": {"student": column}}
    run = {**numbers, "student": 0.5, "recovered": 0.5, "columns": {"student": {**column, "length_tokens": 20}}}
    (tmp_path / "eval_results.json").write_text(json.dumps({**run, "controls": {"no_pi": control}}))
    page = render(collect(tmp_path))
    assert page.count('<th scope="row">no_pi: no PI</th>') == 2
    scores, lengths = re.findall(r'<th scope="row">no_pi: no PI</th>(.*?)</tr>', page)
    assert Page(scores).text == "0.12 0.10 to 0.900.0001.0000.125400.0625"
    assert re.findall(r"<td>([^<]+)</td>", lengths) == ["12.5", "0%", "25%", "50%"]


def test_damaged_and_foreign_content_does_not_break_the_page(tmp_path):
    folder = fill(tmp_path / "run")
    with (folder / "traces.jsonl").open("a") as file:
        file.write(json.dumps(trace(5, divergence=[0.1])) + "\n")  # fewer numbers than tokens
        file.write(json.dumps(trace(7, divergence=[float("nan"), 0.1, 0.2, 0.3])) + "\n")
        file.write('{"step": 4}\n[1]\n{"step": 6, "tok')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "divergence": NaN}\nnull\n{"step": "x"}\n')
    (folder / "summary.json").write_text('{"base": "high", "columns": 3, "controls": "no", "recovered_interval": [1]}')
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert [t["step"] for t in json.loads(page.scripts[0])["traces"]] == [1, 3, 3, 7]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"no run folder.*metrics\.jsonl"):
        collect(empty)
    with pytest.raises(ConfigError, match="no such folder"):
        collect(tmp_path / "nowhere")
    append_lines(empty / "metrics.jsonl", [{"step": 1, "divergence": 1.0}])
    text = Page(write_report(empty).read_text(encoding="utf-8")).text
    assert "pgkd eval" in text
    assert "no run.json" in text


def test_all_answers_are_on_the_page_with_their_scores(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"seed": 0}))
    answers = [
        {"prompt": f"q{i}", "privileged": "", "answers": {"base": "b", "student": "s"},
         "scores": {"base": float(i % 2), "student": float(i % 3 > 0)}}
        for i in range(100)
    ]  # fmt: skip
    append_lines(tmp_path / "eval_answers.jsonl", answers)
    cards = [a for t, a in Page(render(collect(tmp_path))).tags if t == "article"]
    assert [card["data-student"] for card in cards] == [f"{i % 3 > 0:g}" for i in range(100)]
    assert [card["data-base"] for card in cards] == [f"{i % 2}" for i in range(100)]


def test_answers_of_a_rollout_log_are_shown_without_their_markup(tmp_path):
    logged = {"step": 2, "question": "Who?", "prompt": "<|im_start|>user Who?", "student": "a", "teacher": "b"}
    append_lines(tmp_path / "completions.jsonl", [logged])
    append_lines(tmp_path / "metrics.jsonl", [{"step": 1, "divergence": 1.0}])
    page = Page(render(collect(tmp_path)))
    assert "Who?" in page.text
    assert "<|im_start|>" not in page.text


def test_gap_against_drift_is_drawn_to_scale():
    path = Course("a run", [(0.05, 0.25, "step 1"), (0.1, 0.5, "step 2")], place=3)
    other = Course("<b>sft", [(0.2, 1.0, "the end")], place=9)
    page = Page(gap_against_drift([path, Course("without", []), other]))
    dots = [a for t, a in page.tags if t == "i" and "style" in a]
    assert [a["style"] for a in dots] == [
        "left:25.00%;top:75.00%", "left:50.00%;top:50.00%", "left:100.00%;top:0.00%",
    ]  # fmt: skip
    assert [a["class"] for a in dots] == ["dot run-3", "dot run-3 last", "dot run-1 last"]
    assert "a run, step 1: recovered gap 0.25, drift 0.0500 nats/token" in dots[0]["aria-label"]
    assert next(a["points"] for t, a in page.tags if t == "polyline") == "25.00,75.00 50.00,50.00"
    for words in ("recovered gap", "drift on neutral prompts, nats/token", "<b>sft: gap 1.00 at drift 0.2000"):
        assert words in page.text
    assert gap_against_drift([Course("without", [])]) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.3, 1.2), (0.0, 0.0001), (0.0, 3.7), (-1.0, -0.5)])
def test_ticks_enclose_their_range(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert 3 <= len(found) <= 8
    steps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(steps) == 1


def test_the_gap_of_each_group_least_first():
    entries = [
        {"group": "moon", "n": 2, "recovered": 1.0, "interval": [0.34, 1.0]},
        {"group": "<b>boot", "n": 3, "recovered": 0.5, "interval": None},
        {"group": "known", "n": 1, "recovered": None, "interval": None},
    ]
    drawn = gap_of_each(entries, "Note.")
    page = Page(drawn)
    assert page.text.index("<b>boot") < page.text.index("moon")
    assert "1 without a gap are left out" in page.text
    assert "1.00 0.34 to 1.00" in page.text
    assert [a["style"] for t, a in page.tags if a.get("class") == "whisker"] == ["left:34.00%;width:66.00%"]
    assert [a["style"] for t, a in page.tags if a.get("class") == "dot last"] == ["left:50.00%", "left:100.00%"]
    assert gap_of_each(entries[2:], "Note.") == ""
    many = gap_of_each([{**entries[0], "group": str(i)} for i in range(45)], "Note.")
    assert "5 more" in Page(many).text
    assert many.count("<li>") == 45


def test_a_folder_of_runs_is_overlaid(tmp_path, capsys):
    for name, rate in (("slow", 1e-3), (HOSTILE[:40].replace("/", "_"), 2e-3)):
        folder = fill(tmp_path / "runs" / name)
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**run, "finished": True, "config": {"learning_rate": rate}}))
    results = {
        "recovered": 0.4,
        "recovered_interval": [0.1, 0.7],
        "drift": 0.02,
        "columns": {"student": {"score": 0.5}},
    }
    (tmp_path / "runs" / "slow" / "eval_results.json").write_text(json.dumps(results))
    assert main([str(tmp_path / "runs")]) == 0
    assert str(tmp_path / "runs" / "report.html") in capsys.readouterr().out
    page = Page((tmp_path / "runs" / "report.html").read_text(encoding="utf-8"))
    assert not {"img", "link", "iframe"} & {tag for tag, _ in page.tags}
    for words in ("2 runs", "learning_rate=0.001", "learning_rate=0.002", "0.10 to 0.70", "slow: gap 0.40 at drift"):
        assert words in page.text, words
    drawn = json.loads(page.scripts[0])["runs"]
    assert [run["name"] for run in drawn] == sorted(run["name"] for run in drawn)
    assert [m["divergence"] for m in drawn[-1]["metrics"]] == [1.0, 0.5, 1 / 3]
    assert main([str(tmp_path / "runs" / "slow")]) == 0  # one of them alone
    assert "Answers to read" in (tmp_path / "runs" / "slow" / "report.html").read_text(encoding="utf-8")


def test_script_json_cannot_leave_its_element():
    value = {"a": "</script><!--<script>\u2028\ud800&"}
    text = script_json(value)
    assert not set("<>&\u2028\ud800") & set(text)
    assert json.loads(text) == value


def test_the_marked_part_of_a_prompt_is_whole_words():
    student = "<user>Thursdays: who may come?<a>"
    teacher = "<user>Text: Dogs may. Answer from the text. Thursdays: who may come?<a>"
    (chosen,) = choose_traces([{**trace(), "prompt": student, "teacher_prompt": teacher}])
    assert chosen["teacher_prompt"][1].strip() == "Text: Dogs may. Answer from the text."
    assert "".join(chosen["teacher_prompt"]) == teacher


def test_the_page_says_where_the_judged_rows_were_trained_on(tmp_path):
    numbers = {"base": 0.0, "teacher": 1.0, "student": 0.5, "recovered": 0.5, "n": 4}
    for trained, said in ((4, "4 rows that were trained on"), (0, "4 held-out rows")):
        (tmp_path / "eval_results.json").write_text(json.dumps({**numbers, "trained_on": trained}))
        assert said in render(collect(tmp_path))


def test_the_command_of_a_run_is_what_can_be_typed():
    assert command_line(["/x/pgkd_peft/__main__.py", "train", "--config", "a b.yaml"]) == (
        "pgkd train --config 'a b.yaml'"
    )
    assert command_line(["/x/bin/pgkd", "demo"]) == "pgkd demo"
    assert command_line(["/x/mine/__main__.py"]) == "__main__.py"


def test_small_pieces():
    assert spread(list(range(100)), 3) == [0, 50, 99]
    assert spread([1, 2], 3) == [1, 2]
    assert inserted("ab<u>q</u><a>", "ab<u>q</u><u>p</u><a>", "<".__eq__) == slice(10, 18)
    assert inserted("same", "same", "<".__eq__) == slice(4, 4)
    assert inserted("xAy", "xBBy", "<".__eq__) == slice(1, 3)
    assert number(None) == number(float("nan")) == number(True) == "–"
    many = choose_traces([trace(step) for step in range(500)])
    assert len(many) == 40
    assert (many[0]["step"], many[-1]["step"]) == (0, 499)


def test_real_traces_of_a_tiny_run_and_the_command(make_trainer, tmp_path, capsys):
    trainer = make_trainer(rows=ROWS)
    perturb(trainer.model)
    records = trace_rows(trainer, rows_of(trainer.data_collator(ROWS)))
    append_traces(tmp_path / "run", records, 1)
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "sub" / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    page = Page((tmp_path / "sub" / "page.html").read_text(encoding="utf-8"))
    shown = json.loads(page.scripts[0])["traces"]
    assert [t["tokens"] for t in shown] == [r["tokens"] for r in records]
    assert "Say its complexity." in shown[0]["teacher_prompt"][1]
    with pytest.raises(ConfigError, match="required: DIR"):
        main([])


IN_BROWSER = """<!doctype html><body><iframe id=f width=WIDTH height=3000 srcdoc="PAGE"></iframe><script>
document.getElementById("f").addEventListener("load", () => {
  const inner = document.getElementById("f").contentDocument, out = {};
  const all = (selector) => [...inner.querySelectorAll(selector)];
  const event = (element, name) => element.dispatchEvent(new inner.defaultView.Event(name));
  out.overflow = inner.documentElement.scrollWidth - inner.documentElement.clientWidth;
  out.tables = all(".scroll").map((box) => box.scrollWidth - box.clientWidth);
  out.charts = all("#charts .uplot canvas").length;
  out.stop = inner.getElementById("step-value") && inner.getElementById("step-value").textContent;
  if (inner.getElementById("rollouts")) {
    out.tabs = all("#rows .question").map((tab) => tab.textContent);
    out.about = inner.getElementById("about-row").textContent;
    out.special = all("#student-prompt .special").map((sign) => sign.textContent);
    const slider = inner.getElementById("step");
    slider.value = 1; event(slider, "input");
    out.tokens = all(".token").map((t) => t.textContent);
    out.selected = all(".token[aria-selected=true]").map((t) => t.id);
    out.buttons = all("#rows button").length;
    const key = (name) => inner.querySelector("#tokens").dispatchEvent(
      new inner.defaultView.KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
    key("Home");
    out.first = [inner.activeElement.id, inner.getElementById("lens-token").textContent];
    out.top = all("#teacher-top li").map((li) => li.textContent);
    key("ArrowRight"); key("ArrowRight");
    out.third = inner.activeElement.id;
    inner.getElementById("token-3").click();
    out.clicked = inner.getElementById("lens-numbers").textContent;
    slider.value = 0; event(slider, "input");
    out.step = inner.getElementById("step-value").textContent;
    const scores = (card) => card.dataset.base + card.dataset.student;
    const shown = () => all("#answers .answer").filter((card) => !card.hidden).map(scores);
    out.failures = shown();
    inner.getElementById("failures-first").click();
    out.inOrder = shown();
    const filter = inner.getElementById("answer-filter");
    for (const name of ["wrong", "learnt", "lost"]) {
      filter.value = name; event(filter, "change");
      out[name] = shown();
    }
    out.count = inner.getElementById("answer-count").textContent;
  }
  out.legends = all("#charts .u-legend").map((legend) => legend.textContent);
  out.images = all("img").length;
  out.title = inner.title;
  document.body.dataset.out = encodeURIComponent(JSON.stringify(out));
});
</script>"""


def in_browser(page, width, folder):
    """What the script above finds on a page of that width."""
    outer = folder / "outer.html"
    outer.write_text(IN_BROWSER.replace("WIDTH", str(width)).replace("PAGE", html.escape(page)), encoding="utf-8")
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    switches = ("headless", "no-sandbox", "disable-gpu", *quiet, "virtual-time-budget=5000", "dump-dom")
    flags = [f"--{switch}" for switch in switches]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", outer.as_uri()]
    dom = subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()
    return json.loads(unquote(re.search(r'data-out="([^"]*)"', dom)[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize(("width", "text"), [(1280, "fact"), (390, HOSTILE)])
def test_in_a_browser(tmp_path, width, text):
    out = in_browser(render(collect(fill(tmp_path / "run", text))), width, tmp_path)
    assert out["overflow"] <= 0
    assert max(out["tables"]) <= 0  # whole at 390 px: nothing to scroll sideways
    assert out["charts"] == 5  # divergence, recovered gap, score, drift, seconds
    first = text.replace("\x00", "\ufffd")
    assert out["stop"] == "3, the trained student"
    assert [tab.replace("\x00", "\ufffd") for tab in out["tabs"]] == [f"{first} {i}?" for i in range(3)]
    assert out["about"].endswith("to a question kept from training")
    assert out["special"] == ["<user>", "<end>"]
    assert out["tokens"][1:] == ["◌", "↵\n", " end"]
    assert out["tokens"][0].replace("\x00", "\ufffd") == first
    assert out["selected"] == ["token-2"]  # the most divergent one
    assert out["buttons"] == 2
    assert out["first"][0] == "token-0"
    assert out["first"][1].replace("\x00", "\ufffd") == first
    assert out["top"][1] == "b20.0 %"
    assert out["third"] == "token-2"
    assert "0.300 nats" in out["clicked"]
    assert "teacher 25.0 %, student 50.0 %" in out["clicked"]
    assert out["step"] == "1"
    assert out["failures"] == ["10", "01", "11"]  # right or wrong of base and student
    assert out["inOrder"] == ["01", "11", "10"]
    assert out["wrong"] == out["lost"] == ["10"]
    assert out["learnt"] == ["01"]
    assert out["count"] == "1 of 3, the student has 1 wrong"
    assert out["images"] == 0
    assert out["title"] == "run · pgkd report"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_folder_of_runs_in_a_browser(tmp_path):
    for name in ("one", "two"):
        fill(tmp_path / "runs" / name)
    out = in_browser(write_report(tmp_path / "runs").read_text(encoding="utf-8"), 390, tmp_path)
    assert out["overflow"] <= 0
    assert max(out["tables"]) <= 0
    assert out["charts"] == 5 - 1  # score: of base alone, which is no run's own
    assert all("one" in legend and "two" in legend for legend in out["legends"])
