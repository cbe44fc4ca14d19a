"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const PAGE = 12; // responses in the document at a time
  const LONG = 300; // tokens of a response shown at first
  const FOLDED = 400; // characters of a prompt shown at first
  const LEVELS = 6;
  const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

  // ---- theme ----
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const theme = byId("theme");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  dark.addEventListener("change", showTheme);
  showTheme();

  const holder = byId("responses-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const specials = new Set(data.special);
  const state = { page: 0, rows: [], colour: "contribution" };
  const largest = data.responses.reduce((most, r) => Math.max(most, Math.abs(r.contribution)), 0);

  // ---- text and numbers; data becomes text nodes, never markup ----
  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Plain text and names of what would not show, in turn; or one plain string.
  function fill(parent, parts) {
    if (typeof parts === "string") {
      parent.textContent = parts;
      return parent;
    }
    parts.forEach((part, k) => {
      if (k % 2) parent.append(element("span", part === "↵" ? "name end" : "name", part));
      else if (part) parent.append(part);
    });
    return parent;
  }

  function number(value, digits = 3) {
    if (value === 0) return "0";
    const [mantissa, power] = value.toExponential(digits - 1).split("e");
    const exponent = Number(power);
    if (exponent >= -2 && exponent < 5) return Number(value.toPrecision(digits)).toString().replace("-", "−");
    const raised = power.replace("+", "").replace("-", "⁻").replace(/\d/g, (d) => SUPERSCRIPTS[d]);
    return `${mantissa}×10${raised}`.replace("-", "−");
  }

  const signed = (value) => (value > 0 ? "+" : "") + number(value);

  function level(value) {
    const scale = data.scale[state.colour];
    if (!scale || !value) return "";
    const size = Math.round(LEVELS * Math.sqrt(Math.min(1, Math.abs(value) / scale)));
    return size ? (value > 0 ? "up" : "down") + size : "";
  }

  // ---- choosing ----
  const controls = ["sort", "prompt", "sign", "size", "colour"].map(byId);
  const [sort, prompt, sign, size, colour] = controls;
  const ORDERS = {
    size: (a, b) => Math.abs(b.contribution) - Math.abs(a.contribution),
    down: (a, b) => a.contribution - b.contribution,
    up: (a, b) => b.contribution - a.contribution,
    advantage: (a, b) => b.advantage - a.advantage,
    prompt: (a, b) => a.prompt - b.prompt,
    batch: () => 0,
  };
  const SIGNS = { positive: (a) => a > 0, negative: (a) => a < 0, zero: (a) => a === 0 };

  function choose() {
    state.page = 0;
    state.colour = colour.value;
    const least = Number(size.value) * largest;
    state.rows = data.responses
      .filter((r) => prompt.value === "" || r.prompt === Number(prompt.value))
      .filter((r) => !sign.value || SIGNS[sign.value](r.advantage))
      .filter((r) => Math.abs(r.contribution) >= least)
      .sort((a, b) => ORDERS[sort.value](a, b) || a.id - b.id);
    showLegend();
    show();
  }

  // ---- showing ----
  function show() {
    const first = state.page * PAGE;
    const rows = state.rows.slice(first, first + PAGE);
    hideTip();
    byId("list").replaceChildren(...rows.map(article));
    const all = data.responses.length < data.total ? ` (of ${data.total} those that contribute most)` : "";
    byId("shown").textContent = rows.length
      ? `Responses ${first + 1} to ${first + rows.length} of ${state.rows.length}${all}`
      : "No response fits these filters";
    document.querySelectorAll("[data-step]").forEach((button) => {
      const page = state.page + Number(button.dataset.step);
      button.disabled = page < 0 || page * PAGE >= state.rows.length;
    });
  }

  function article(response) {
    const made = element("article", "response");
    const header = element("header");
    const title = element("h3", "sr", `Response ${response.id}`);
    const about = data.prompts[response.prompt];
    header.append(title, element("span", "", `response ${response.id}`), element("span", "", `prompt ${about.id}`));
    header.append(element("span", "", `advantage ${signed(response.advantage)}`));
    header.append(element("span", "", `${response.t.length} tokens`));
    header.append(element("span", "sum", `${number(response.contribution)} ${data.unit}`));
    made.append(header);
    if (about.name) made.append(folded("source", about.name, [["text", about.name]]));
    if (about.text) made.append(about.name ? whole(about.text) : folded("source", about.text.flatMap((piece) => piece[1]), about.text));
    const text = element("p", "tokens");
    text.dir = "auto";
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", `Tokens of response ${response.id}`);
    text.response = response;
    addTokens(text, 0, LONG);
    made.append(text);
    if (response.t.length > LONG) made.append(more(text));
    return made;
  }

  function pieces(parent, list) {
    list.forEach(([kind, parts]) => parent.append(fill(element("span", kind === "text" ? "" : kind), parts)));
    return parent;
  }

  // A text, of which a long one opens only when asked to.
  function folded(className, parts, list) {
    const flat = parts.filter((_, k) => k % 2 === 0).join("");
    if (flat.length <= FOLDED) {
      const text = pieces(element("p", className), list);
      text.dir = "auto";
      return text;
    }
    return details(`${flat.slice(0, FOLDED / 2).trim()}…`, className, list);
  }

  const whole = (list) => details("Whole prompt", "source", list);

  function details(summary, className, list) {
    const made = element("details", "fold");
    const head = element("summary", "", summary);
    head.dir = "auto";
    made.append(head);
    made.addEventListener("toggle", () => {
      if (made.childElementCount > 1) return;
      const text = pieces(element("p", className), list);
      text.dir = "auto";
      made.append(text);
    });
    return made;
  }

  function addTokens(text, from, to) {
    const response = text.response;
    const values = state.colour === "contribution" ? response.c : response.v;
    for (let k = from; k < Math.min(to, response.t.length); k += 1) {
      const kind = specials.has(response.t[k]) ? "special " : "";
      const token = fill(element("span", kind + level(values[k])), data.texts[response.t[k]]);
      token.dataset.k = k;
      token.tabIndex = k === 0 ? 0 : -1;
      text.append(token);
    }
  }

  function more(text) {
    const button = element("button", "", `Show all ${text.response.t.length} tokens`);
    button.type = "button";
    button.addEventListener("click", () => {
      const shown = text.childElementCount;
      addTokens(text, shown, Infinity);
      enter(text.children[shown]);
      button.remove();
    });
    return button;
  }

  function showLegend() {
    const scale = data.scale[state.colour];
    const unit = state.colour === "contribution" ? ` ${data.unit}` : "";
    const bound = (sign_) => `${sign_ < 0 ? "≤ −" : "≥ "}${number(scale, 2)}${unit}`;
    byId("legend-low").textContent = scale ? bound(-1) : "all 0";
    byId("legend-high").textContent = scale ? bound(1) : "";
    const steps = [];
    for (let k = -LEVELS; k <= LEVELS; k += 1) steps.push(element("span", k ? (k < 0 ? "down" : "up") + Math.abs(k) : ""));
    byId("legend").replaceChildren(...steps);
  }

  // ---- the numbers of one token ----
  const tip = byId("tip");
  let shownFor = null;

  function showTip(token) {
    const response = token.parentElement.response;
    const k = Number(token.dataset.k);
    const advantage = response.a ? response.a[k] : response.advantage;
    const list = element("dl");
    const rows = [
      ["contribution", `${number(response.c[k])} ${data.unit}`],
      ["covariance term", number(response.v[k])],
      ["advantage", signed(advantage)],
      ["probability", number(Math.exp(response.l[k]))],
      ["entropy there", `${number(response.h[k])} nats`],
      ["index of sampled token", `${k}`],
    ];
    rows.forEach(([name, value]) => list.append(element("dt", "", name), element("dd", "", value)));
    tip.replaceChildren(fill(element("div", "text"), data.texts[response.t[k]]), list);
    tip.hidden = false;
    const box = token.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
    const below = box.bottom + tip.offsetHeight + 12 < window.innerHeight;
    tip.style.left = `${Math.max(12, left)}px`;
    tip.style.top = `${below ? box.bottom + 6 : Math.max(12, box.top - tip.offsetHeight - 6)}px`;
    if (shownFor) shownFor.removeAttribute("aria-describedby");
    token.setAttribute("aria-describedby", "tip");
    shownFor = token;
  }

  function hideTip() {
    tip.hidden = true;
    if (shownFor) shownFor.removeAttribute("aria-describedby");
    shownFor = null;
  }

  function enter(token) {
    token.parentElement.querySelectorAll('[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
    token.tabIndex = 0;
    token.focus();
  }

  const tokenAt = (event) => event.target.closest("[data-k]");
  const list = byId("list");
  list.addEventListener("pointerover", (event) => { const token = tokenAt(event); if (token) showTip(token); else hideTip(); });
  list.addEventListener("pointerleave", hideTip);
  list.addEventListener("click", (event) => { const token = tokenAt(event); if (token) enter(token); });
  list.addEventListener("focusin", (event) => { const token = tokenAt(event); if (token) showTip(token); });
  list.addEventListener("focusout", hideTip);
  list.addEventListener("keydown", (event) => {
    const token = tokenAt(event);
    if (!token) return;
    const tokens = token.parentElement.children;
    const k = Number(token.dataset.k);
    const to = { ArrowRight: k + 1, ArrowLeft: k - 1, ArrowDown: k + 10, ArrowUp: k - 10, Home: 0, End: tokens.length - 1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (to === undefined) return;
    event.preventDefault();
    const back = to < k;
    let at = Math.min(tokens.length - 1, Math.max(0, to));
    while (tokens[at] && !tokens[at].offsetParent) at += back ? -1 : 1; // special tokens that are hidden
    if (tokens[at]) enter(tokens[at]);
  });
  window.addEventListener("scroll", () => { if (shownFor !== document.activeElement) hideTip(); }, { passive: true });

  // ---- wiring ----
  data.prompts.forEach((about, k) => {
    const option = element("option", "", `${about.id}`);
    option.value = k;
    prompt.append(option);
  });
  controls.forEach((control) => control.addEventListener("change", choose));
  document.querySelectorAll("[data-step]").forEach((button) => button.addEventListener("click", () => {
    state.page += Number(button.dataset.step);
    show();
    byId("viewer").scrollIntoView({ block: "start" });
  }));
  document.querySelectorAll("[data-prompt]").forEach((button) => button.addEventListener("click", () => {
    prompt.value = data.prompts.findIndex((about) => String(about.id) === button.dataset.prompt);
    choose();
    byId("responses").scrollIntoView({ block: "start" });
    byId("prompt").focus({ preventScroll: true });
  }));
  const marks = byId("marks");
  marks.parentElement.hidden = !specials.size && !data.prompts.some((about) => about.text && about.text.length > 1);
  marks.addEventListener("change", () => byId("list").classList.toggle("bare", !marks.checked));
  byId("viewer").hidden = false;
  choose();
})();
