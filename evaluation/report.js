"use strict";
// The trace viewer. Text of traces is only ever set as textContent, never as markup. A trace is parsed when it is shown.
const viewer = () => {
  const $ = (id) => document.getElementById(id);
  const parse = (id) => JSON.parse($(id).textContent);
  const data = parse("data"), rows = data.rows, cache = new Map();
  const byKey = new Map(rows.map((r) => [r.arm + "\n" + r.problem, r]));
  let shown = [], at = 0, sides = [], active = 0, why = "";

  const make = (tag, kind, text) => {
    const e = document.createElement(tag);
    if (kind) e.className = kind;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const fill = (select, values, first) => {
    if (first !== undefined) select.append(new Option(first, ""));
    for (const v of values) select.append(new Option(v, v));
  };
  const load = (row) => {
    if (!cache.has(row.i)) {
      const t = parse("t" + row.i);
      t.codes = Array.from(t.text); // spans count code points, not UTF-16 units
      cache.set(row.i, t);
    }
    return cache.get(row.i);
  };

  fill($("f-arm"), data.arms);
  fill($("f-beside"), data.arms, "nothing");
  fill($("f-family"), [...new Set(rows.map((r) => r.family))].sort(), "all");
  for (const [value, label] of Object.entries(data.kinds)) $("f-kind").append(new Option(label, value));
  fill($("f-level"), Object.keys(data.levels));
  $("f-level").parentElement.hidden = !Object.keys(data.levels).length;
  [$("f-beside").value, $("f-arm").value] = data.pair;

  const other = (r) => byKey.get($("f-beside").value + "\n" + r.problem);
  const flip = (r) => { const o = other(r); return o && o.right !== r.right ? (r.right ? "to_right" : "to_wrong") : ""; };
  const fits = (r, kind) => !kind || flip(r) === kind || r.kinds.includes(kind);

  // Pieces of text[a, b) with forced text and the quoted error marked.
  const marked = (t, a, b) => {
    const box = document.createDocumentFragment();
    const spans = [...t.forced.map(([x, y]) => [x, y, "b"]), ...(t.span ? [[...t.span, "mark"]] : [])]
      .filter(([x, y]) => x < b && y > a);
    const cuts = new Set([a, b]);
    for (const [x, y] of spans) for (const c of [x, y]) if (a < c && c < b) cuts.add(c);
    const ends = [...cuts].sort((x, y) => x - y);
    for (let i = 0; i + 1 < ends.length; i++) {
      const span = spans.find(([x, y]) => x <= ends[i] && ends[i] < y), text = t.codes.slice(ends[i], ends[i + 1]).join("");
      box.append(span ? make(span[2], "", text) : document.createTextNode(text));
    }
    return box;
  };

  const readout = (t, i) => {
    const n = t.steps.length, a = i < n ? t.steps[i][3] : n ? t.steps[n - 1][4] : 0, b = i < n ? t.steps[i][4] : t.tokens;
    const said = [i < n ? `step ${i + 1} of ${n}` : "after the thinking", `tokens ${a} to ${b - 1}`];
    for (const [rule, step, , score] of t.scores) if (step === i) said.push(`${rule} ${score}`);
    for (const [rule, step, score, limit] of t.events) if (step - 1 === i) said.push(`${rule} stepped in (${score} against ${limit})`);
    if (i === t.wrong) said.push("judge: wrong step" + (t.why ? ", " + t.why : ""));
    else if (i < n && t.steps[i][2] === "loop") said.push("judge: part of a circle");
    if (i < n && t.steps[i][2] === "block") said.push("starts with forced text");
    return said.join(" · ");
  };

  const draw = (s) => {
    const level = $("f-level").value, channels = level ? data.levels[level].channels : 0;
    const limits = { ...(t => t.detail && t.detail.scores.length ? data.thresholds : {})(s.t), ...data.limits[s.t.arm] };
    plots.timeline(s.curve, s.t, limits, level, channels, s.at, (i) => choose(s, i, true));
    plots.spectrum(s.bars, s.t, level, channels, s.at, data.frequencies);
  };

  // Make step i of a side the chosen one; -1: none.
  const choose = (s, i, scroll) => {
    s.at = Math.max(-1, Math.min(i, s.steps.length - 1));
    s.steps.forEach((e, j) => e.setAttribute("aria-selected", String(j === s.at)));
    s.text.setAttribute("aria-activedescendant", s.at < 0 ? "" : s.steps[s.at].id);
    if (s.at >= 0 && scroll) {
      const e = s.steps[s.at], a = s.text.getBoundingClientRect(), b = e.getBoundingClientRect();
      if (b.top < a.top || b.bottom > a.bottom) s.text.scrollTop += b.top - a.top - 12;
    }
    s.note.textContent = s.at < 0 ? "choose a step for its scores and spectrum" : readout(s.t, s.at);
    draw(s);
  };

  const side = (row, number) => {
    const t = load(row), box = make("article", "side"), head = make("h3");
    if (!t.scores.length && t.detail && t.detail.scores.length) { t.scores = t.detail.scores; t.unwatched = true; }
    const s = { t, steps: [], at: -1, text: make("div", "text"), curve: make("div", "curve"), bars: make("div", "bars"), note: make("p", "note") };
    head.append(make("span", "", t.arm), make("span", "badge" + (t.right ? " right" : ""), t.right ? "right" : t.cut ? "cut off" : "wrong"));
    const info = [`${t.tokens.toLocaleString("en")} tokens`, t.steps.length === 1 ? "1 step" : `${t.steps.length} steps`, t.answer === null ? "no answer" : `answer ${t.answer}`];
    for (const e of t.events) info.push(`${e[0]} after step ${e[1]} (${e[2].toFixed(2)} against ${e[3].toFixed(2)})`);
    if (t.alarms.length) info.push(`false alarm: ${t.alarms.join(", ")}`);
    if (t.misses.length) info.push(`missed: ${t.misses.join(", ")}`);
    if (t.unwatched) info.push("scores were computed afterwards, nothing watched");
    s.text.tabIndex = 0;
    s.text.setAttribute("role", "listbox");
    s.text.setAttribute("aria-label", `steps of ${t.arm}`);
    const step = (kind, a, b, title) => {
      const e = make("div", "step " + kind);
      e.id = `s${number}-${s.steps.length}`;
      e.setAttribute("role", "option");
      if (title) e.title = title;
      e.append(marked(t, a, b));
      const last = e.lastChild; // the separator is shown by the gap between the boxes
      if (last && last.nodeType === 3) last.data = last.data.trimEnd();
      s.steps.push(e);
      s.text.append(e);
    };
    let end = 0;
    t.steps.forEach(([a, b, kind], i) => {
      if (i === t.wrong) step("wrong", a, b, "wrong step: " + t.why);
      else step(kind, a, b, kind === "loop" ? "part of a circle" : kind ? "intervention" : "");
      end = b;
    });
    if (end < t.codes.length) step("answer", end, t.codes.length);
    s.text.addEventListener("click", (e) => {
      const i = s.steps.indexOf(e.target.closest(".step"));
      active = number;
      if (i >= 0) choose(s, i);
    });
    s.text.addEventListener("focus", () => { active = number; });
    box.append(head, make("div", "meta", info.join(" · ")), s.text, s.curve, s.note, s.bars);
    return [s, box];
  };

  const first = (t) => t.events.length ? t.events[0][1] - 1 : t.wrong ?? 0;

  const show = (i, scroll) => {
    at = Math.max(0, Math.min(i, shown.length - 1));
    const pane = $("pane"), row = shown[at];
    pane.replaceChildren();
    [...$("list").children].forEach((li, j) => li.setAttribute("aria-selected", String(j === at)));
    $("list").setAttribute("aria-activedescendant", row ? "row-" + at : "");
    sides = [];
    if (!row) { pane.append(make("p", "empty", "No trace fits these filters." + why)); return; }
    const t = load(row), o = other(row), ask = make("div", "ask", t.question), box = make("div", "sides");
    ask.append(make("small", "", `${t.problem} · ${t.family}, difficulty ${t.difficulty} · right answer ${t.gold}`));
    for (const r of o && o !== row ? [o, row] : [row]) {
      const [s, e] = side(r, sides.length);
      sides.push(s);
      box.append(e);
    }
    active = sides.length - 1;
    pane.append(ask, box);
    for (const s of sides) choose(s, first(s.t), true);
    pane.scrollTop = 0;
    if (scroll && $("list").children[at]) $("list").children[at].scrollIntoView({ block: "nearest" });
  };

  const update = () => {
    const arm = $("f-arm").value, family = $("f-family").value, kind = $("f-kind").value;
    const words = $("f-search").value.trim().toLowerCase();
    const holds = (r) => { const t = load(r); return [t.problem, t.question, t.text].join("\n").toLowerCase().includes(words); };
    const asked = rows.filter((r) => r.arm === arm && (!family || r.family === family));
    const blind = data.of_steps.includes(kind) ? asked.filter((r) => !r.judged).length : 0;
    why = blind ? ` ${blind} of ${asked.length} were ${data.unjudged}.` : "";
    shown = asked.filter((r) => fits(r, kind) && (!words || holds(r)));
    const list = $("list");
    list.replaceChildren(...shown.map((r, i) => {
      const li = make("li"), turn = flip(r);
      li.id = "row-" + i;
      li.setAttribute("role", "option");
      const mark = turn ? (turn === "to_right" ? " ↑ to right" : " ↓ to wrong") : "";
      li.append(make("span", "dot" + (r.right ? " right" : "")), `${r.family} ${r.difficulty}${mark}`, make("small", "", r.rules.join(", ")), make("small", "", r.question));
      li.addEventListener("click", () => show(i));
      return li;
    }));
    $("count").textContent = `${shown.length} shown`;
    show(0);
  };

  for (const id of ["f-arm", "f-beside", "f-family", "f-kind"]) $(id).addEventListener("change", update);
  $("f-level").addEventListener("change", () => sides.forEach(draw));
  let wait = 0;
  $("f-search").addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(update, 150); });
  const stepBy = (n) => { const s = sides[active]; if (s) choose(s, Math.max(0, s.at + n), true); };
  const nextEvent = () => {
    const s = sides[active], found = s && s.t.events.map((e) => e[1] - 1);
    if (found && found.length) choose(s, found.find((i) => i > s.at) ?? found[0], true);
  };
  const nextKind = () => { const k = $("f-kind"); k.selectedIndex = (k.selectedIndex + 1) % k.options.length; update(); };
  const keys = {
    j: () => show(at + 1, true), k: () => show(at - 1, true), l: () => stepBy(1), h: () => stepBy(-1), e: nextEvent,
    s: () => { active = (active + 1) % Math.max(1, sides.length); if (sides[active]) sides[active].text.focus(); },
    f: nextKind, "/": () => $("f-search").focus(),
  };
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) { if (e.key === "Escape") e.target.blur(); return; }
    const inText = sides.some((s) => s.text === e.target), inList = e.target === $("list");
    const arrow = inText ? { ArrowRight: "l", ArrowLeft: "h" } : inList ? { ArrowDown: "j", ArrowUp: "k" } : {};
    const act = keys[arrow[e.key] || e.key];
    if (act) { e.preventDefault(); act(); }
  });
  const redraw = () => sides.forEach(draw);
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.dataset.theme || (dark ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let width = 0;
  new ResizeObserver(([e]) => { if (Math.abs(e.contentRect.width - width) > 20) { width = e.contentRect.width; redraw(); } }).observe($("pane"));
  update();
};
requestAnimationFrame(() => setTimeout(viewer)); // the page is painted first
