"use strict";
(() => {
  const { metrics, traces, final, runs } = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };

  // ---- curves --------------------------------------------------------------------------------------------------

  const CHARTS = [
    { title: "divergence", unit: "nats/token", series: [["divergence", "training", "student"], ["eval_divergence", "held-out", "third"]], zero: true },
    { title: "recovered gap", note: "on held-out rows", unit: "share of the gap", series: [["eval_recovered", "recovered", "student"]] },
    { title: "recovered gap in nats", note: "on the teacher's answers to held-out rows", unit: "share of the gap", series: [["eval_recovered_nats", "recovered", "student"]] },
    { title: "score", note: "of answers to held-out rows", unit: "mean score", series: [["eval_base", "base", "base"], ["eval_teacher", "teacher", "teacher"], ["eval_student", "student", "student"]], overlay: "eval_student", zero: true },
    { title: "drift", note: "from the base, on neutral prompts", unit: "nats/token", series: [["eval_drift", "drift", "student"]], zero: true },
    { title: "entropy", unit: "nats", series: [["student_entropy", "student", "student"], ["teacher_entropy", "teacher", "teacher"]], zero: true },
    { title: "top-1 agreement", note: "of student and teacher", unit: "share of tokens", series: [["top1_agreement", "training", "student"], ["eval_top1_agreement", "held-out", "third"]] },
    { title: "completion length", unit: "tokens", series: [["completion_length", "length", "student"]], zero: true },
    { title: "cut off at max_new_tokens", unit: "share of rollouts", series: [["truncated_completions", "cut off", "student"]], zero: true },
    { title: "seconds by phase", unit: "seconds a step", series: [["seconds_rollout", "rollout", "third"], ["seconds_teacher", "teacher", "teacher"], ["seconds_student", "student", "student"]], zero: true },
    { title: "gradient norm", unit: "norm", series: [["grad_norm", "norm", "student"]], zero: true },
  ];
  const short = (value) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    return size >= 100 ? value.toFixed(0) : size >= 1 || size === 0 ? value.toFixed(2) : size >= 0.001 ? value.toPrecision(3) : value.toExponential(1);
  };
  const HEIGHT = 208;
  let drawn = [];

  // Of one run the series that the chart names; of several runs the first of them that a run has, a series a run.
  function seriesOf(chart) {
    const points = (from, key) => from.filter((m) => m[key] !== undefined).map((m) => [m.step, m[key]]);
    const found = runs === undefined
      ? chart.series.map(([key, label, colour]) => ({ label, colour, points: points(metrics, key) }))
      : runs.map((run, i) => ({
        label: run.name, colour: "run-" + (i % 8), dash: i >= 8 ? [6, 4] : undefined,
        points: points(run.metrics, chart.overlay ?? chart.series[0][0]),
      }));
    return found.filter((series) => series.points.length);
  }

  function drawCharts() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    const room = byId("charts");
    drawn.forEach((plot) => plot.destroy());
    drawn = [];
    room.replaceChildren();
    for (const chart of CHARTS) {
      const series = seriesOf(chart);
      if (!series.length) continue;
      const steps = [...new Set(series.flatMap((s) => s.points.map(([step]) => step)))].sort((a, b) => a - b);
      const columns = series.map((s) => { const known = new Map(s.points); return steps.map((step) => known.get(step) ?? null); });
      const figure = make("figure", undefined, "chart");
      const caption = make("figcaption", chart.title + " ");
      const [, which] = chart.series.find(([key]) => key === chart.overlay) ?? chart.series[0];
      caption.append(make("span", [runs && chart.series.length > 1 ? which : "", chart.note ?? ""].filter(Boolean).join(", ")));
      const plot = make("div");
      figure.append(caption, plot);
      figure.setAttribute("role", "group");
      figure.setAttribute("aria-label", chart.title + ": " + series.map(({ label, points }) =>
        `${label} ${short(points[0][1])} at step ${points[0][0]}, ${short(points.at(-1)[1])} at step ${points.at(-1)[0]}`).join("; "));
      room.append(figure);
      const axis = { stroke: colour("muted"), font: "11px system-ui, sans-serif", labelFont: "11px system-ui, sans-serif", labelSize: 18, labelGap: 2, grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1, size: 4 } };
      drawn.push(new uPlot({
        width: plot.clientWidth, height: HEIGHT,
        cursor: { drag: { x: false, y: false }, sync: { key: "run" }, points: { size: 7 } },
        scales: { x: { time: false }, y: { range: (u, low, high) => {
          if (low == null) return [0, 1];
          const margin = (high - low || Math.abs(high) || 1) * 0.08;
          return [chart.zero && low >= 0 ? 0 : low - margin, high + margin];
        } } },
        axes: [{ ...axis, size: 30, space: 60, label: "optimizer step" }, { ...axis, size: 46, space: 32, label: chart.unit, values: (u, ticks) => ticks.map((t) => +t.toPrecision(6)) }],
        legend: { markers: { fill: (u, i) => colour(series[i - 1]?.colour ?? "muted"), width: 0 } },
        series: [{ label: "step", value: (u, v) => v ?? steps.at(-1) },
          ...series.map(({ label, points, colour: name, dash }) => ({
            label, stroke: colour(name), width: 1.75, dash, spanGaps: true, value: (u, v, i, at) => at == null ? short(points.at(-1)[1]) : short(v), // the last one while nothing is pointed at
            points: { show: points.length < 40, size: 4.5, fill: colour(name) },
          }))],
      }, [steps, ...columns], plot));
    }
    if (!drawn.length) room.append(make("p", "No metrics in this folder.", "empty"));
  }

  drawCharts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    drawn.forEach((plot) => plot.setSize({ width: plot.root.parentElement.clientWidth, height: HEIGHT }));
  });

  if (runs !== undefined) return;

  // ---- answers -------------------------------------------------------------------------------------------------

  const cards = [...document.querySelectorAll("#answers .answer")];
  const score = (card, who) => card.dataset[who] === undefined ? undefined : +card.dataset[who];
  const wanted = {
    all: () => true,
    wrong: (card) => score(card, "student") < 1,
    learnt: (card) => score(card, "student") >= 1 && score(card, "base") < 1,
    lost: (card) => score(card, "student") < 1 && score(card, "base") >= 1,
  };
  if (cards.some((card) => score(card, "student") !== undefined)) {
    const button = byId("failures-first"), filter = byId("answer-filter");
    const arrange = () => {
      const first = button.getAttribute("aria-pressed") === "true";
      const order = first ? [...cards].sort((a, b) => (score(a, "student") ?? 2) - (score(b, "student") ?? 2)) : cards;
      cards.forEach((card) => { card.hidden = !wanted[filter.value](card); });
      byId("answers").replaceChildren(...order);
      byId("answer-count").textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length}, the student has `
        + `${cards.filter(wanted.wrong).length} wrong`;
    };
    button.addEventListener("click", () => { button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true"); arrange(); });
    filter.addEventListener("change", arrange);
    byId("answer-order").hidden = false;
    button.setAttribute("aria-pressed", "true");
    arrange();
  }

  // ---- rollouts ------------------------------------------------------------------------------------------------

  if (!traces.length && !final.length) {
    byId("rollouts").replaceChildren(make("h2", "Rollouts, token by token"), make("p", "No traces in this folder (rollout_log_steps writes them).", "empty"));
    return;
  }
  // One stop of the slider a traced step, and the trained student last.
  const stops = [...new Set(traces.map((t) => t.step))].map((step) => ({ name: String(step), traces: traces.filter((t) => t.step === step) }));
  if (final.length) stops.push({ name: `${final[0].step}, the trained student`, traces: final });
  const all = [...traces, ...final].flatMap((t) => t.divergence).sort((a, b) => a - b);
  const top = Math.max(all[Math.floor(0.98 * (all.length - 1))], 1e-6);
  const heat = (value) => (0.78 * Math.sqrt(Math.min(1, Math.max(0, value) / top))).toFixed(3);
  const percent = (p) => (p >= 0.9995 ? "100" : (100 * p).toPrecision(p < 0.001 ? 1 : 3).replace(/e.*/, "")) + " %";
  const shown = (text) => text === "" ? "◌" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ /, "␣");
  const slider = byId("step"), tokensBox = byId("tokens"), lens = byId("lens");
  let trace, selected = 0;
  slider.max = stops.length - 1;

  function showStep(index, wanted = 0) {
    const here = stops[index].traces;
    byId("step-value").textContent = stops[index].name;
    slider.setAttribute("aria-valuetext", "step " + stops[index].name);
    const row = Math.min(wanted, here.length - 1);
    byId("rows").replaceChildren(...here.map((t, i) => {
      const mean = t.divergence.reduce((a, b) => a + b, 0) / t.divergence.length;
      const button = make("button");
      button.append(make("span", t.question || (t.has_privileged ? "with PI" : "without PI"), "question"));
      button.append(make("small", `${t.has_privileged ? "" : "no PI, "}${mean.toFixed(3)} nats`));
      if (t.question) button.title = t.question;
      button.type = "button";
      button.setAttribute("aria-pressed", i === row);
      button.addEventListener("click", () => { showStep(index, i); byId("rows").children[i].focus(); });
      return button;
    }));
    showTrace(here[row]);
  }

  // A prompt with its special tokens as small marks: they are read, but say nothing.
  function marked(text, special) {
    const signs = [...(special ?? [])].sort((a, b) => b.length - a.length);
    const nodes = [];
    let plain = "";
    for (let i = 0; i < text.length;) {
      const sign = signs.find((s) => s && text.startsWith(s, i));
      if (sign === undefined) { plain += text[i++]; continue; }
      if (plain) nodes.push(plain);
      plain = "";
      nodes.push(make("span", sign, "special"));
      i += sign.length;
    }
    return plain ? [...nodes, plain] : nodes;
  }

  function showTrace(which) {
    trace = which;
    const [before, added, after] = trace.teacher_prompt;
    const hint = make("mark");
    hint.append(...marked(added, trace.special));
    byId("student-prompt").replaceChildren(...marked(trace.prompt, trace.special));
    byId("teacher-prompt").replaceChildren(...marked(before, trace.special), ...(added ? [hint] : []), ...marked(after, trace.special));
    byId("teacher-details").hidden = !added;
    tokensBox.replaceChildren(...trace.tokens.map((text, i) => {
      const token = make("span", undefined, "token" + (trace.in_loss[i] ? "" : " unscored"));
      token.style.setProperty("--a", heat(trace.divergence[i]));
      token.id = "token-" + i;
      token.tabIndex = -1;
      token.setAttribute("role", "option");
      token.setAttribute("aria-selected", "false");
      if (text === "") token.append(make("span", "◌", "sign"));
      text.split(/(\n)/).forEach((part) => token.append(...(part === "\n" ? [make("span", "↵", "sign"), "\n"] : [part])));
      return token;
    }));
    const total = trace.divergence.reduce((a, b) => a + b, 0);
    byId("about-row").textContent = `${trace.tokens.length} tokens, ${(total / trace.tokens.length).toFixed(3)} nats a token, `
      + `${trace.generated ? "written by the student" : "the reference answer"}${trace.held_out ? ", to a question kept from training" : ""}${trace.truncated ? ", cut off at max_new_tokens" : ""}`;
    let largest = 0;
    trace.divergence.forEach((value, i) => { if (value > trace.divergence[largest]) largest = i; });
    select(largest);
  }

  function fill(list, candidates, chosen) {
    list.replaceChildren(...candidates.map(([text, p]) => {
      const item = make("li", undefined, text === chosen ? "chosen" : "");
      item.style.setProperty("--p", (100 * p).toFixed(1) + "%");
      item.append(make("span", shown(text)), make("span", percent(p)));
      return item;
    }));
  }

  function select(i, focus) {
    const boxes = tokensBox.children;
    if (boxes[selected]) { boxes[selected].setAttribute("aria-selected", "false"); boxes[selected].tabIndex = -1; }
    selected = i;
    boxes[i].setAttribute("aria-selected", "true");
    boxes[i].tabIndex = 0;
    if (focus) boxes[i].focus();
    const token = byId("lens-token");
    token.textContent = shown(trace.tokens[i]);
    token.style.setProperty("--a", heat(trace.divergence[i]));
    byId("lens-numbers").textContent = `${short(trace.divergence[i])} nats · token ${i + 1} of ${trace.tokens.length}. `
      + `Its probability: teacher ${percent(trace.teacher_p[i])}, student ${percent(trace.student_p[i])}.`;
    fill(byId("teacher-top"), trace.teacher_top[i], trace.tokens[i]);
    fill(byId("student-top"), trace.student_top[i], trace.tokens[i]);
  }

  const indexOf = (event) => {
    const token = event.target.closest(".token");
    return token ? [...tokensBox.children].indexOf(token) : -1;
  };
  tokensBox.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && indexOf(event) >= 0) select(indexOf(event));
  });
  tokensBox.addEventListener("click", (event) => { if (indexOf(event) >= 0) select(indexOf(event), true); });
  tokensBox.addEventListener("focusin", (event) => { if (indexOf(event) >= 0 && indexOf(event) !== selected) select(indexOf(event)); });
  tokensBox.addEventListener("keydown", (event) => {
    const last = tokensBox.children.length - 1;
    const to = { ArrowRight: selected + 1, ArrowDown: selected + 1, ArrowLeft: selected - 1, ArrowUp: selected - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(Math.max(0, Math.min(last, to)), true);
  });
  slider.addEventListener("input", () => showStep(+slider.value));
  byId("scale-top").textContent = short(top);
  lens.hidden = false;
  slider.value = stops.length - 1;
  showStep(stops.length - 1);
})();
