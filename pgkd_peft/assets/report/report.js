"use strict";
(() => {
  const { metrics, traces } = JSON.parse(document.getElementById("data").textContent);
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
    { title: "recovered gap", unit: "on held-out rows", series: [["eval_recovered", "recovered", "student"]] },
    { title: "score", unit: "of answers to held-out rows", series: [["eval_base", "base", "base"], ["eval_teacher", "teacher", "teacher"], ["eval_student", "student", "student"]], zero: true },
    { title: "drift", unit: "nats/token from the base, on neutral prompts", series: [["eval_drift", "drift", "student"]], zero: true },
    { title: "entropy", unit: "nats", series: [["student_entropy", "student", "student"], ["teacher_entropy", "teacher", "teacher"]], zero: true },
    { title: "top-1 agreement", unit: "share of tokens", series: [["top1_agreement", "training", "student"], ["eval_top1_agreement", "held-out", "third"]] },
    { title: "completion", unit: "tokens", series: [["completion_length", "length", "student"]], zero: true },
    { title: "cut off at max_new_tokens", unit: "share of rollouts", series: [["truncated_completions", "cut off", "student"]], zero: true },
    { title: "seconds by phase", unit: "a step", series: [["seconds_rollout", "rollout", "third"], ["seconds_teacher", "teacher", "teacher"], ["seconds_student", "student", "student"]], zero: true },
    { title: "gradient norm", unit: "", series: [["grad_norm", "norm", "student"]], zero: true },
  ];
  const short = (value) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    return size >= 100 ? value.toFixed(0) : size >= 1 || size === 0 ? value.toFixed(2) : size >= 0.001 ? value.toPrecision(3) : value.toExponential(1);
  };
  let drawn = [];

  function drawCharts() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    const room = byId("charts");
    drawn.forEach((plot) => plot.destroy());
    drawn = [];
    room.replaceChildren();
    for (const chart of CHARTS) {
      const present = chart.series.filter(([key]) => metrics.some((m) => m[key] !== undefined));
      if (!present.length) continue;
      const points = metrics.filter((m) => present.some(([key]) => m[key] !== undefined));
      const figure = make("figure", undefined, "chart");
      const caption = make("figcaption", chart.title + " ");
      caption.append(make("span", chart.unit));
      const plot = make("div");
      figure.append(caption, plot);
      figure.setAttribute("role", "group");
      figure.setAttribute("aria-label", chart.title + ": " + present.map(([key, label]) => {
        const values = points.filter((m) => m[key] !== undefined);
        return `${label} ${short(values[0][key])} at step ${values[0].step}, ${short(values.at(-1)[key])} at step ${values.at(-1).step}`;
      }).join("; "));
      room.append(figure);
      const last = (key) => points.filter((m) => m[key] !== undefined).at(-1)[key]; // shown while nothing is pointed at
      const axis = { stroke: colour("muted"), font: "11px system-ui, sans-serif", grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1, size: 4 } };
      drawn.push(new uPlot({
        width: plot.clientWidth, height: 190,
        cursor: { drag: { x: false, y: false }, sync: { key: "run" }, points: { size: 7 } },
        scales: { x: { time: false }, y: { range: (u, low, high) => {
          if (low == null) return [0, 1];
          const margin = (high - low || Math.abs(high) || 1) * 0.08;
          return [chart.zero && low >= 0 ? 0 : low - margin, high + margin];
        } } },
        axes: [{ ...axis, size: 30, space: 60 }, { ...axis, size: 48, space: 32, values: (u, ticks) => ticks.map((t) => +t.toPrecision(6)) }],
        legend: { markers: { fill: (u, i) => colour(present[i - 1]?.[2] ?? "muted"), width: 0 } },
        series: [{ label: "step", value: (u, v) => v ?? points.at(-1).step },
          ...present.map(([key, label, name]) => ({
            label, stroke: colour(name), width: 1.75, spanGaps: true, value: (u, v, i, at) => at == null ? short(last(key)) : short(v),
            points: { show: points.filter((m) => m[key] !== undefined).length < 40, size: 4.5, fill: colour(name) },
          }))],
      }, [points.map((m) => m.step), ...present.map(([key]) => points.map((m) => m[key] ?? null))], plot));
    }
    if (!drawn.length) room.append(make("p", "No metrics in this folder.", "empty"));
  }

  drawCharts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    drawn.forEach((plot) => plot.setSize({ width: plot.root.parentElement.clientWidth, height: 190 }));
  });

  // ---- rollouts ------------------------------------------------------------------------------------------------

  if (!traces.length) {
    byId("rollouts").replaceChildren(make("h2", "Rollouts, token by token"), make("p", "No traces in this folder (rollout_log_steps writes them).", "empty"));
    return;
  }
  const steps = [...new Set(traces.map((t) => t.step))];
  const all = traces.flatMap((t) => t.divergence).sort((a, b) => a - b);
  const top = Math.max(all[Math.floor(0.98 * (all.length - 1))], 1e-6);
  const heat = (value) => (0.78 * Math.sqrt(Math.min(1, Math.max(0, value) / top))).toFixed(3);
  const percent = (p) => (p >= 0.9995 ? "100" : (100 * p).toPrecision(p < 0.001 ? 1 : 3).replace(/e.*/, "")) + " %";
  const shown = (text) => text === "" ? "◌" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ /, "␣");
  const slider = byId("step"), tokensBox = byId("tokens"), lens = byId("lens");
  let trace, selected = 0;
  slider.max = steps.length - 1;

  function showStep(index, wanted = 0) {
    const here = traces.filter((t) => t.step === steps[index]);
    byId("step-value").textContent = steps[index];
    slider.setAttribute("aria-valuetext", "step " + steps[index]);
    const row = Math.min(wanted, here.length - 1);
    byId("rows").replaceChildren(...here.map((t, i) => {
      const mean = t.divergence.reduce((a, b) => a + b, 0) / t.divergence.length;
      const button = make("button", `${t.has_privileged ? "PI" : "no PI"} · ${mean.toFixed(3)} nats`);
      button.type = "button";
      button.setAttribute("aria-pressed", i === row);
      button.addEventListener("click", () => { showStep(index, i); byId("rows").children[i].focus(); });
      return button;
    }));
    showTrace(here[row]);
  }

  function showTrace(which) {
    trace = which;
    byId("student-prompt").textContent = trace.prompt;
    const [before, added, after] = trace.teacher_prompt;
    byId("teacher-prompt").replaceChildren(before, ...(added ? [make("mark", added)] : []), after);
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
      + `${trace.generated ? "written by the student" : "the reference answer"}${trace.truncated ? ", cut off at max_new_tokens" : ""}`;
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
  slider.value = steps.length - 1;
  showStep(steps.length - 1);
})();
