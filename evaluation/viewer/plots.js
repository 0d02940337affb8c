"use strict";
// What is drawn under a trace: scores over tokens, neurons over tokens, and the spectrum of one step. No text of a trace.
const plots = (() => {
  const LEFT = 34, RIGHT = 8, CURVE = 92, HEAT = 76, AXIS = 20, GAP = 8;
  const NS = "http://www.w3.org/2000/svg";
  const add = (parent, tag, attrs, text) => {
    const e = document.createElementNS(NS, tag);
    for (const k in attrs) e.setAttribute(k, attrs[k]);
    if (text !== undefined) e.textContent = text;
    parent.append(e);
    return e;
  };
  const picture = (w, h, label) => {
    const e = document.createElementNS(NS, "svg");
    e.setAttribute("viewBox", `0 0 ${w} ${h}`);
    e.setAttribute("role", "img");
    e.setAttribute("aria-label", label);
    return e;
  };
  const colour = (rule) => (/^(intra|inter|instance)$/.test(rule) ? `var(--c-${rule})` : "var(--accent)");
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const tick = (x) => x.toLocaleString("en");

  const curves = (t, limits) => {
    const rules = new Map();
    for (const [rule, step, token, score] of t.scores) {
      if (!rules.has(rule)) rules.set(rule, []);
      rules.get(rule).push([token, score, step]);
    }
    return [...rules].map(([rule, points]) => {
      const limit = limits[rule], values = points.map((p) => p[1]).concat(limit === undefined ? [] : [limit]);
      return { rule, points, limit, low: Math.min(0, ...values), high: Math.max(1, ...values) };
    });
  };

  // The neurons of a level as an image: one pixel a channel and column, opacity = activity.
  const heat = (detail, level, channels) => {
    const values = bytes(detail.levels[level].heat), columns = values.length / channels;
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = channels;
    const hex = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim();
    const rgb = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    const context = canvas.getContext("2d"), image = context.createImageData(columns, channels);
    for (let c = 0; c < columns; c++) for (let n = 0; n < channels; n++)
      image.data.set([...rgb, values[c * channels + n]], 4 * (n * columns + c));
    context.putImageData(image, 0, 0);
    return canvas;
  };

  // Scores and neurons over the tokens of t, one x axis. pick(step) is called on a click.
  const timeline = (box, t, limits, level, channels, at, pick) => {
    const w = Math.max(260, box.clientWidth), lines = curves(t, limits), detail = level && t.detail;
    const top = 6, curve = lines.length ? CURVE : 8, base = top + curve;
    const h = base + (detail ? GAP + HEAT : 0) + AXIS, x = (token) => LEFT + (token / t.tokens) * (w - LEFT - RIGHT);
    const most = lines.map((l) => `${l.rule} up to ${Math.max(...l.points.map((p) => p[1])).toFixed(2)}`).join(", ");
    const svg = picture(w, h, `probe scores over ${t.tokens} tokens: ${most || "nothing watched"}`);
    const band = (a, b, kind, y, height) =>
      add(svg, "rect", { x: x(a), y, width: Math.max(1.5, x(b) - x(a)), height, class: kind });
    const full = h - AXIS - top;
    t.steps.forEach(([, , kind, a, b], i) => {
      if (i === t.wrong) band(a, b, "p-wrong", top, full);
      else if (kind === "loop") band(a, b, "p-loop", top, full);
    });
    const here = at < 0 ? null : at < t.steps.length ? t.steps[at].slice(3) : [(t.steps.at(-1) || [0, 0, 0, 0, 0])[4], t.tokens];
    for (const [a, b] of t.forced_tokens) band(a, b, "p-forced", top, 5);
    const own = lines.some((l) => l.low < 0 || l.high > 1);
    if (lines.length) for (const [y, label] of [[0, own ? "low" : "0"], [0.5, ""], [1, own ? "high" : "1"]]) {
      const py = base - y * (curve - 10);
      add(svg, "line", { x1: LEFT, x2: w - RIGHT, y1: py, y2: py, class: "p-grid" });
      add(svg, "text", { x: LEFT - 6, y: py + 4, "text-anchor": "end" }, label);
    }
    for (const { rule, points, limit, low, high } of lines) {
      const y = (v) => base - ((v - low) / (high - low)) * (curve - 10), style = `stroke:${colour(rule)}`;
      if (limit !== undefined) add(svg, "line", { x1: LEFT, x2: w - RIGHT, y1: y(limit), y2: y(limit), class: "p-limit", style });
      add(svg, "path", { d: "M" + points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("L"), class: points.length > 250 ? "p-line p-thin" : "p-line", style });
      if (points.length <= 250) for (const [token, score, step] of points)
        add(add(svg, "circle", { cx: x(token), cy: y(score), r: 2.6, style: `fill:${colour(rule)}` }), "title", {},
          `${rule} after step ${step + 1}: ${score}` + (limit === undefined ? "" : `, threshold ${limit}`));
    }
    for (const [rule, step, score, limit, token] of t.events) {
      add(svg, "line", { x1: x(token), x2: x(token), y1: top, y2: h - AXIS, class: "p-event", style: `stroke:${colour(rule)}` });
      const flag = add(svg, "path", { d: `M${x(token)},${top}l7,4l-7,4z`, style: `fill:${colour(rule)}` });
      add(flag, "title", {}, `${rule} stepped in after step ${step}: ${score} against ${limit}`);
    }
    if (here) band(here[0], here[1], "p-here", top, full);
    const end = t.steps.length ? t.steps.at(-1)[4] : 0;
    if (end && end < t.tokens) add(svg, "line", { x1: x(end), x2: x(end), y1: top, y2: h - AXIS, class: "p-end" });
    const near = (n) => 10 ** Math.floor(Math.log10(n)), raw = t.tokens / 5, power = near(raw);
    const gap = Math.max(1, [1, 2, 5, 10].map((m) => m * power).find((m) => m >= raw) || raw);
    for (let v = 0; v <= t.tokens; v += gap)
      add(svg, "text", { x: x(v), y: h - 5, "text-anchor": v ? "middle" : "start" }, tick(v) + (v ? "" : " tokens"));
    svg.addEventListener("click", (e) => {
      const r = svg.getBoundingClientRect(), token = (((e.clientX - r.left) / r.width) * w - LEFT) / (w - LEFT - RIGHT) * t.tokens;
      const i = t.steps.findIndex((s) => s[3] <= token && token < s[4]);
      pick(i < 0 ? t.steps.length : i);
    });
    const frame = document.createElement("div");
    frame.className = "timeline";
    if (detail) {
      const canvas = heat(t.detail, level, channels), clip = document.createElement("div");
      add(svg, "text", { x: LEFT - 6, y: base + GAP + 10, "text-anchor": "end" }, "1");
      add(svg, "text", { x: LEFT - 6, y: base + GAP + HEAT, "text-anchor": "end" }, String(channels));
      canvas.style.width = `${(100 * canvas.width * t.detail.per) / t.tokens}%`; // the last column may be a short one
      clip.style.cssText = `left:${100 * LEFT / w}%;width:${100 * (w - LEFT - RIGHT) / w}%;`
        + `top:${100 * (base + GAP) / h}%;height:${100 * HEAT / h}%`;
      clip.append(canvas);
      frame.append(clip);
    }
    frame.append(svg);
    const key = document.createElement("div");
    key.className = "p-key";
    for (const { rule } of lines) {
      const dot = document.createElement("i");
      dot.style.background = colour(rule);
      key.append(dot, rule + " ");
    }
    if (!lines.length) key.append("no probe scores: nothing watched. ");
    if (detail) key.append(`${channels} channels of ${level} over tokens`);
    box.replaceChildren(frame, key);
  };

  // The spectrum of step `at` beside the mean of all steps of t.
  const spectrum = (box, t, level, channels, at, frequencies) => {
    box.replaceChildren();
    if (!t.detail || !level || at < 0 || at >= t.steps.length) return;
    const { spectrum: text, peak } = t.detail.levels[level], f = frequencies.length, all = bytes(text);
    const share = (i, k) => (all[i * f + k] / 255) * peak, mine = frequencies.map((_, k) => share(at, k));
    const title = `spectrum of step ${at + 1}: ${channels} channels of ${level}`;
    const note = document.createElement("div");
    note.className = "p-key";
    if (!mine.some((v) => v > 0)) {
      note.textContent = `${title}: none, the step has fewer than 4 tokens or its channels do not vary`;
      box.append(note);
      return;
    }
    const mean = frequencies.map((_, k) => t.steps.reduce((s, _, i) => s + share(i, k), 0) / t.steps.length);
    const w = Math.max(260, box.clientWidth), h = 84, top = Math.max(...mine, ...mean), base = h - AXIS;
    const x = (v) => LEFT + (v / (frequencies.at(-1) + frequencies[0])) * (w - LEFT - RIGHT), y = (v) => base - (v / top) * (base - 6);
    const peakAt = frequencies[mine.indexOf(Math.max(...mine))];
    const svg = picture(w, h, `${title}; strongest at ${peakAt.toFixed(2)} cycles per token`);
    const bar = (x(frequencies[1]) - x(frequencies[0])) * 0.7;
    mine.forEach((v, k) => {
      const rect = add(svg, "rect", { x: x(frequencies[k]) - bar / 2, y: y(v), width: bar, height: base - y(v), class: "p-bar" });
      add(rect, "title", {}, `${frequencies[k].toFixed(3)} cycles per token (a period of ${(1 / frequencies[k]).toFixed(1)} tokens): ${(100 * v).toFixed(1)}% of the power, mean step ${(100 * mean[k]).toFixed(1)}%`);
    });
    add(svg, "path", { d: "M" + mean.map((v, k) => `${x(frequencies[k]).toFixed(1)},${y(v).toFixed(1)}`).join("L"), class: "p-mean" });
    add(svg, "line", { x1: LEFT, x2: w - RIGHT, y1: base, y2: base, class: "p-grid" });
    add(svg, "text", { x: LEFT - 6, y: 14, "text-anchor": "end" }, `${Math.round(100 * top)}%`);
    for (const v of [0.1, 0.2, 0.3]) add(svg, "text", { x: x(v), y: h - 5, "text-anchor": "middle" }, String(v));
    add(svg, "text", { x: w - RIGHT, y: h - 5, "text-anchor": "end" }, "0.5 cycles per token");
    note.textContent = `${title}; line: mean of this trace's steps`;
    box.append(svg, note);
  };
  return { timeline, spectrum };
})();
