"use strict";
// The trace viewer. Text of traces is only ever set as textContent, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const byKey = new Map(data.traces.map((t) => [t.arm + "\n" + t.problem, t]));
  let shown = [], at = 0;

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
  const unique = (key) => [...new Set(data.traces.map((t) => t[key]))].sort();

  fill($("f-arm"), data.arms);
  fill($("f-beside"), data.arms, "nothing");
  fill($("f-family"), unique("family"), "all");
  fill($("f-problem"), unique("problem"), "all");
  $("f-arm").value = data.arms.includes("full") ? "full" : data.arms[0] || "";
  $("f-beside").value = data.arms.includes("vanilla") ? "vanilla" : "";

  const other = (t) => byKey.get($("f-beside").value + "\n" + t.problem);
  const outcomes = {
    right: (t) => t.right, wrong: (t) => !t.right, cut: (t) => t.cut, circle: (t) => t.circles,
    acted: (t) => t.events.length > 0, error: (t) => t.wrong !== null,
    repaired: (t) => t.right && other(t) && !other(t).right,
    broken: (t) => !t.right && other(t) && other(t).right,
  };

  // Pieces of text[a, b) with forced text and the quoted error marked.
  const marked = (t, a, b) => {
    const box = document.createDocumentFragment();
    const kind = (i) => t.forced.some(([x, y]) => x <= i && i < y) ? "b"
      : t.span && t.span[0] <= i && i < t.span[1] ? "mark" : "";
    const cuts = new Set([a, b]);
    for (const [x, y] of [...t.forced, ...(t.span ? [t.span] : [])])
      for (const c of [x, y]) if (a < c && c < b) cuts.add(c);
    const ends = [...cuts].sort((x, y) => x - y);
    for (let i = 0; i + 1 < ends.length; i++) {
      const k = kind(ends[i]), text = t.codes.slice(ends[i], ends[i + 1]).join("");
      box.append(k ? make(k, "", text) : document.createTextNode(text));
    }
    return box;
  };

  const side = (t) => {
    t.codes = t.codes || Array.from(t.text); // spans count code points, not UTF-16 units
    const box = make("article", "side"), head = make("h3");
    head.append(make("span", "", t.arm), make("span", "badge" + (t.right ? " right" : ""), t.right ? "right" : t.cut ? "cut off" : "wrong"));
    const acts = t.events.map((e) => `${e[0]} after step ${e[1]} (${e[2].toFixed(2)} > ${e[3].toFixed(2)})`).join(", ");
    const info = [`${t.tokens} tokens`, `${t.steps.length} steps`, t.answer === null ? "no answer" : `answer ${t.answer}`];
    if (acts) info.push(acts);
    box.append(head, make("div", "meta", info.join(" · ")));
    let end = 0;
    t.steps.forEach(([a, b, kind], i) => {
      const step = make("div", "step " + (i === t.wrong ? "wrong" : kind));
      if (i === t.wrong) step.title = "wrong step: " + t.why;
      else if (kind) step.title = kind === "loop" ? "part of a circle" : "intervention";
      step.append(marked(t, a, b));
      const last = step.lastChild; // the separator is shown by the gap between the boxes
      if (last && last.nodeType === 3) last.data = last.data.trimEnd();
      box.append(step);
      end = b;
    });
    if (end < t.codes.length) {
      const step = make("div", "step answer");
      step.append(marked(t, end, t.codes.length));
      box.append(step);
    }
    return box;
  };

  const show = (i, scroll) => {
    at = Math.max(0, Math.min(i, shown.length - 1));
    const pane = $("pane");
    pane.replaceChildren();
    [...$("list").children].forEach((li, j) => li.setAttribute("aria-selected", String(j === at)));
    const t = shown[at];
    if (!t) { pane.append(make("p", "empty", "No trace fits these filters.")); return; }
    const ask = make("div", "ask", t.question);
    ask.append(make("small", "", `${t.problem} · ${t.family}, difficulty ${t.difficulty} · right answer ${t.gold}`));
    const sides = make("div", "sides"), o = other(t);
    if (o && o !== t) sides.append(side(o));
    sides.append(side(t));
    pane.append(ask, sides);
    pane.scrollTop = 0;
    if (scroll && $("list").children[at]) $("list").children[at].scrollIntoView({ block: "nearest" });
  };

  const update = () => {
    const arm = $("f-arm").value, family = $("f-family").value, problem = $("f-problem").value;
    const test = outcomes[$("f-outcome").value], words = $("f-search").value.trim().toLowerCase();
    shown = data.traces.filter((t) => t.arm === arm && (!family || t.family === family) && (!problem || t.problem === problem)
      && (!test || test(t)) && (!words || (t.question + "\n" + t.text).toLowerCase().includes(words)));
    const list = $("list");
    list.replaceChildren();
    shown.forEach((t, i) => {
      const li = make("li");
      li.append(make("span", "dot" + (t.right ? " right" : "")), document.createTextNode(
        `${t.family} ${t.difficulty}` + (t.events.length ? " · " + t.events.map((e) => e[0]).join(", ") : "")));
      li.append(make("small", "", t.question));
      li.addEventListener("click", () => show(i));
      list.append(li);
    });
    $("count").textContent = `${shown.length} shown`;
    show(0);
  };

  for (const id of ["f-arm", "f-beside", "f-family", "f-problem", "f-outcome"]) $(id).addEventListener("change", update);
  $("f-search").addEventListener("input", update);
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) { if (e.key === "Escape") e.target.blur(); return; }
    if (e.key === "j") show(at + 1, true);
    else if (e.key === "k") show(at - 1, true);
    else if (e.key === "/") { e.preventDefault(); $("f-search").focus(); }
  });
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.dataset.theme || (dark ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });
  update();
})();
