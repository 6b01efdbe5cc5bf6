// The screen of one run. Everything that comes from data goes through `textContent`; nothing is built from HTML text.
"use strict";

const $ = (id) => document.getElementById(id);
const TOKEN_KEY = "datalloy-token";
const POLL = 700; // milliseconds between two looks at how far the texts are read

const state = { about: null, offset: 0, total: 0, rows: [], current: -1, pictures: [], request: 0, open: null };

// --- talking to the server --------------------------------------------------------------------------------------

function token() {
  const given = location.hash.slice(1);
  if (given && given !== "list") {
    sessionStorage.setItem(TOKEN_KEY, given);
    history.replaceState(null, "", location.pathname); // out of the address bar and the history
  }
  return sessionStorage.getItem(TOKEN_KEY) || "";
}

async function ask(path, options = {}) {
  const response = await fetch("api/" + path, {
    ...options,
    headers: { "X-Datalloy-Token": token(), ...(options.body ? { "Content-Type": "application/json" } : {}) },
  });
  if (response.ok) return response;
  const text = await response.text();
  let detail = text;
  try { detail = JSON.parse(text).detail; } catch { /* not JSON: shown as it is */ }
  throw new Error(typeof detail === "string" ? detail : JSON.stringify(detail));
}

const get = async (path) => (await ask(path)).json();
const post = async (path, body) => (await ask(path, { method: "POST", body: JSON.stringify(body) })).json();

function say(text, isFault = false) {
  $("message").textContent = text;
  $("message").classList.toggle("fault", isFault);
  $("message").hidden = !text;
}

async function guarded(work) {
  try { await work(); } catch (error) { say(error.message, true); }
}

// --- small parts --------------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const count = (value) => value.toLocaleString("en");
const signed = (value) => (value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + short(value));
function short(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 10000) ? value.toExponential(2) : value.toPrecision(3);
}
const tone = (value) => (value === null ? "" : value > 0 ? "good" : value < 0 ? "bad" : "");
const LABELS = {
  utility: "utility", utility_se: "standard error", loss: "loss", supervised_tokens: "answer tokens",
  length_tokens: "tokens in all", rank: "rank", other_utility: "utility in the other run", difference: "difference",
  domain: "domain", id: "id", state: "state", reason: "reason",
};
const label = (name) => LABELS[name] || name.replace(/^utility:/, "utility for ");
const isKept = (row) => (row.overruled === null ? row.selected : row.overruled);

function options(select, entries, any) {
  const chosen = select.value;
  select.replaceChildren(
    ...(any === undefined ? [] : [element("option", { value: "" }, any)]),
    ...entries.map(([value, text]) => element("option", { value }, text)),
  );
  if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
}

async function showPicture(image, row, index, large) {
  try {
    const blob = await (await ask(`picture/${row}/${index}${large ? "?large=true" : ""}`)).blob();
    const address = URL.createObjectURL(blob);
    state.pictures.push(address);
    image.src = address;
  } catch (error) {
    image.replaceWith(element("span", { class: "note" }, error.message));
  }
}

// --- what the run is ----------------------------------------------------------------------------------------------

async function readAbout() {
  const about = (state.about = await get("run"));
  document.title = `${about.name}: samples`;
  $("name").textContent = about.name;
  showCounts();
  for (const name of ["domain", "state", "reason"]) {
    options($(name), about[name].map((entry) => [entry.name, `${entry.name} (${count(entry.rows)})`]), "any");
  }
  options($("by"), about.numbers.map((name) => [name, label(name)]));
  options($("sort"), [...about.numbers, "domain", "id", "state", "reason"].map((name) => [name, label(name)]));
  $("decision").querySelector("[value=differs]").hidden = !about.other;
  $("compare").hidden = !about.other;
  followTexts();
}

function showCounts() {
  const about = state.about;
  const how = about.arm ? ` · chosen by ${about.arm.scorer}` : "";
  const against = about.other ? ` · compared with ${about.other}` : "";
  $("about").textContent = `${count(about.kept)} of ${count(about.rows)} kept, ${count(about.overruled)} overruled by you`
    + ` · scored by ${about.method}${how} · ${about.folder}${against}`;
}

function followTexts() {
  const texts = state.about.texts;
  const ready = texts.is_complete;
  $("text").disabled = !ready;
  $("export").disabled = !ready;
  if (texts.fault) say(`Texts and pictures cannot be shown: ${texts.fault}`, true);
  else if (!ready) {
    say(`Reading the texts: ${count(texts.read)} of ${count(texts.of)} …`);
    setTimeout(() => guarded(async () => {
      state.about.texts = await get("texts");
      if (state.about.texts.is_complete) { say(""); await showRows(); }
      followTexts();
    }), POLL);
  }
}

// --- the list -----------------------------------------------------------------------------------------------------

function query() {
  const asked = new URLSearchParams();
  for (const name of ["domain", "decision", "reason", "state", "by", "least", "most", "text", "sort", "descending"]) {
    if ($(name).value !== "" && !$(name).disabled) asked.set(name, $(name).value);
  }
  return asked;
}

async function showRows({ keepCurrent = true } = {}) {
  const number = ++state.request;
  const asked = query();
  asked.set("offset", state.offset);
  asked.set("limit", $("limit").value);
  const page = await get(`rows?${asked}`);
  if (number !== state.request) return; // a later question has been asked meanwhile
  state.pictures.splice(0).forEach((address) => URL.revokeObjectURL(address));
  Object.assign(state, { rows: page.rows, total: page.total });
  if (!keepCurrent) state.current = -1;
  $("found").textContent = page.total
    ? `${count(page.total)} found, ${count(page.kept)} of them kept`
    : "Nothing found";
  const limit = Number($("limit").value);
  $("page").textContent = `page ${count(Math.floor(state.offset / limit) + 1)} of ${count(Math.max(1, Math.ceil(page.total / limit)))}`;
  $("previous").disabled = state.offset === 0;
  $("next").disabled = state.offset + limit >= page.total;
  for (const id of ["keep-page", "drop-page", "undo-page"]) $(id).disabled = !page.rows.length;
  showHead();
  $("rows").replaceChildren(...page.rows.map(tableRow));
  if (!page.rows.length) {
    $("rows").append(element("tr", {}, element("td", { colspan: 8, class: "empty" }, "No sample matches; widen the filter.")));
  }
  mark(Math.min(state.current, page.rows.length - 1), false);
}

const COLUMNS = [["", ""], ["", "sample"], ["id", "domain, id"], ["utility", "utility"], ["loss", "loss"], ["supervised_tokens", "tokens"], ["reason", "decision"]];
const EXTRA = new Set(["difference", "loss", "supervised_tokens"]); // give way to an open sample on a narrow screen

function columns() {
  return state.about.other ? [...COLUMNS.slice(0, 4), ["difference", "difference"], ...COLUMNS.slice(4)] : COLUMNS;
}

function showHead() {
  const sort = $("sort").value, descending = $("descending").value === "true";
  $("head").replaceChildren(...columns().map(([key, text]) => {
    if (!key) return element("th", { scope: "col" }, text);
    const arrow = sort === key ? (descending ? " ↓" : " ↑") : "";
    const order = sort === key ? (descending ? "descending" : "ascending") : "none";
    const isNumber = state.about.numbers.includes(key);
    return element("th", { scope: "col", "aria-sort": order, class: isNumber ? `n ${EXTRA.has(key) ? "extra" : ""}` : "" },
      element("button", { type: "button", onclick: () => sortBy(key) }, text + arrow));
  }));
}

function sortBy(key) {
  const again = $("sort").value === key;
  $("descending").value = again ? String($("descending").value !== "true") : String(state.about.numbers.includes(key));
  $("sort").value = key;
  changed();
}

function tableRow(row, index) {
  const picture = element("td", { class: "picture" });
  if (row.pictures) {
    const image = element("img", { alt: `first of ${row.pictures} picture${row.pictures > 1 ? "s" : ""}` });
    picture.append(image);
    showPicture(image, row.row, 0, false);
  }
  const said = element("td", { class: "said", dir: "auto" });
  if (row.question === undefined) said.append(element("span", { class: "note" }, "text not read"));
  else said.append(row.question, element("span", { class: "answer", dir: "auto" }, row.answer));
  const cells = [
    picture, said,
    element("td", { class: "where" }, row.domain, element("br"), element("span", { class: "note" }, row.id)),
    element("td", { class: `n ${tone(row.utility)}`, "data-label": "utility" }, signed(row.utility)),
  ];
  if (state.about.other) {
    cells.push(element("td", { class: "n extra", "data-label": "difference", title: `other run: ${signed(row.other_utility)}` }, signed(row.difference)));
  }
  cells.push(
    element("td", { class: "n extra", "data-label": "loss" }, short(row.loss)),
    element("td", { class: "n extra", "data-label": "answer tokens" }, short(row.supervised_tokens)),
    element("td", {}, decision(row)),
  );
  return element("tr", {
    tabindex: index === 0 ? "0" : "-1",
    class: `${isKept(row) ? "is-kept" : "is-dropped"}${row.overruled === null ? "" : " overruled"}`,
    onclick: () => { mark(index); open(index); },
    onfocus: () => { mark(index, false); },
  }, ...cells);
}

function decision(row) {
  const other = row.other_kept === undefined || row.other_kept === null ? "" : ` · other run: ${row.other_kept ? "kept" : "dropped"}`;
  return element("span", { class: `decision ${isKept(row) ? "good" : "bad"}` }, isKept(row) ? "kept" : "dropped",
    element("small", {}, (row.overruled === null ? row.reason : `by you; selection: ${row.selected ? "kept" : "dropped"}`) + other));
}

function mark(index, focus = true) {
  if (index < 0) return;
  state.current = index;
  [...$("rows").children].forEach((line, position) => {
    line.classList.toggle("current", position === index);
    line.tabIndex = position === index ? 0 : -1;
    if (position === index && focus) line.focus();
  });
}

async function turn(pages) {
  const limit = Number($("limit").value);
  const offset = state.offset + pages * limit;
  if (offset < 0 || offset >= state.total) return;
  state.offset = offset;
  await showRows({ keepCurrent: false });
  mark(0);
}

// --- one sample ---------------------------------------------------------------------------------------------------

async function open(index, { again = false } = {}) {
  const row = await get(`sample/${state.rows[index].row}`);
  if (again && state.open !== row.row) return; // closed while it was read, or another one opened
  state.open = row.row;
  const turns = (row.turns || []).map((one) => element("div", { class: "turn" }, element("h3", {}, one.role),
    ...one.parts.map((part) => {
      if (typeof part === "string") return element("div", { class: "said", dir: "auto" }, part);
      const image = element("img", { alt: `picture ${part + 1} of the sample` });
      showPicture(image, row.row, part, true);
      return image;
    })));
  const facts = [
    ...state.about.numbers.map((name) => [label(name), name.startsWith("utility") && name !== "utility_se" || name === "difference" ? signed(row[name]) : short(row[name])]),
    ["state", row.state], ["reason", row.reason], ["from", row.origin || "not read"],
  ];
  const buttons = element("div", { class: "actions" },
    element("button", { type: "button", onclick: () => guarded(() => decide([row.row], true)) }, "Keep (K)"),
    element("button", { type: "button", onclick: () => guarded(() => decide([row.row], false)) }, "Drop (D)"),
    element("button", { type: "button", onclick: () => guarded(() => decide([row.row], null)) }, "Undo (U)"));
  $("detail").replaceChildren(
    element("div", { class: "top" }, element("h2", {}, `${row.domain} / ${row.id}`),
      element("button", { type: "button", "aria-label": "Close", onclick: close }, "✕")),
    decision(row), buttons,
    element("h2", {}, "Conversation"),
    ...(turns.length ? turns : [element("p", { class: "note" }, "Its text has not been read.")]),
    element("h2", {}, "Measured"),
    element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])));
  $("detail").hidden = false;
  document.querySelector(".layout").classList.add("open");
  if (window.matchMedia("(max-width: 1000px)").matches) $("detail").focus();
}

function close() {
  $("detail").hidden = true;
  state.open = null;
  document.querySelector(".layout").classList.remove("open");
  mark(Math.max(0, state.current));
}

// --- deciding -----------------------------------------------------------------------------------------------------

async function decide(rows, kept) {
  if (!rows.length) return;
  Object.assign(state.about, await post("overrides", { rows, kept }));
  showCounts();
  const line = document.activeElement && document.activeElement.closest("tbody tr");
  await showRows();
  if (line) mark(state.current);
  const position = state.rows.findIndex((row) => row.row === state.open);
  if (position >= 0) await open(position, { again: true });
}

async function exportEdited() {
  $("export").disabled = true;
  say("Writing …");
  try {
    const written = await post("export", {});
    const once = state.about.has_mixture ? " Each row once: the counts of the mixture are in export/, not here." : "";
    say(`${count(written.rows)} rows written to ${written.folder}: ${written.files.join(", ")}.${once}`);
  } finally {
    $("export").disabled = false;
  }
}

// --- pictures of the numbers --------------------------------------------------------------------------------------

async function showHistogram() {
  const asked = query();
  for (const name of ["least", "most", "sort", "descending"]) asked.delete(name);
  const { edges, kept, dropped } = await get(`histogram?${asked}`);
  if (!edges.length) { $("histogram").replaceChildren(); return; }
  const width = 240, height = 74, base = 58, bar = width / kept.length;
  const top = Math.max(1, ...kept.map((value, i) => value + dropped[i]));
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}` });
  kept.forEach((value, i) => {
    const low = (base * value) / top, high = (base * dropped[i]) / top;
    if (value) svg.append(drawn("rect", { class: "kept", x: i * bar, y: base - low, width: bar - 0.5, height: low }));
    if (dropped[i]) svg.append(drawn("rect", { class: "dropped", x: i * bar, y: base - low - high, width: bar - 0.5, height: high }));
  });
  const span = edges[edges.length - 1] - edges[0];
  if (edges[0] < 0 && edges[0] + span > 0) {
    const zero = (-edges[0] / span) * width;
    svg.append(drawn("line", { x1: zero, x2: zero, y1: 0, y2: base }));
  }
  svg.append(drawn("text", { x: 0, y: 72 }, short(edges[0])),
    drawn("text", { x: width, y: 72, "text-anchor": "end" }, short(edges[edges.length - 1])));
  $("histogram").replaceChildren(svg);
}

async function showAgreement() {
  if (!state.about.other) return;
  const found = await get("agreement");
  const by = found.kept_by;
  const rank = found.spearman === null ? "not defined" : found.spearman.toFixed(2);
  const differing = state.about.other_data;
  const warning = differing.length
    ? element("p", { class: "note" }, `Samples are matched by domain and id, but the data files of ${differing.join(", ")} differ between the runs.`)
    : "";
  $("agreement").replaceChildren(warning, element("dl", {}, ...[
    ["Spearman of utilities", rank], ["in both runs", count(found.both)], ["only here", count(found.only_here)],
    ["only there", count(found.only_there)], ["kept by both", count(by.both)], ["kept only here", count(by.here)],
    ["kept only there", count(by.there)], ["kept by neither", count(by.neither)],
  ].flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])));
  const { counts, x, y } = found.grid;
  if (!counts.length) return;
  const side = 240, cell = side / counts.length, most = Math.max(...counts.flat());
  const svg = drawn("svg", { viewBox: `0 0 ${side} ${side + 34}` }, drawn("rect", { class: "frame", x: 0.5, y: 0.5, width: side - 1, height: side - 1 }));
  counts.forEach((column, i) => column.forEach((value, j) => {
    if (!value) return;
    const strength = 0.25 + 0.75 * (Math.log1p(value) / Math.log1p(most));
    svg.append(drawn("rect", { class: "cell", x: i * cell, y: side - (j + 1) * cell, width: cell, height: cell, "fill-opacity": strength }));
  }));
  svg.append(drawn("text", { x: 0, y: side + 14 }, short(x[0])), drawn("text", { x: side, y: side + 14, "text-anchor": "end" }, short(x[x.length - 1])),
    drawn("text", { x: side / 2, y: side + 30, "text-anchor": "middle" }, `across: here, up: there (${short(y[0])} to ${short(y[y.length - 1])})`));
  $("grid").replaceChildren(svg);
}

// --- what a person does -------------------------------------------------------------------------------------------

let waiting = 0;
function changed() {
  clearTimeout(waiting);
  waiting = setTimeout(() => guarded(async () => {
    state.offset = 0;
    if (!$("message").classList.contains("fault")) say(state.about.texts.is_complete ? "" : $("message").textContent);
    await Promise.all([showRows({ keepCurrent: false }), showHistogram()]);
  }), 180);
}

function keyPressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && !$("detail").hidden) { close(); return; }
  if (event.target.closest("input, select, textarea")) return;
  if (event.target.closest("button, summary, a") && event.key === "Enter") return;
  const chosen = state.rows[state.current];
  const rows = state.open !== null && !$("detail").hidden ? [state.open] : chosen ? [chosen.row] : [];
  const keys = {
    "/": () => { $("filters").open = true; $("text").focus(); },
    ArrowDown: () => mark(Math.min(state.current + 1, state.rows.length - 1)),
    ArrowUp: () => mark(Math.max(state.current - 1, 0)),
    ArrowRight: () => guarded(() => turn(1)),
    ArrowLeft: () => guarded(() => turn(-1)),
    Enter: () => chosen && guarded(() => open(state.current)),
    k: () => guarded(() => decide(rows, true)),
    d: () => guarded(() => decide(rows, false)),
    u: () => guarded(() => decide(rows, null)),
  };
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function start() {
  if (window.matchMedia("(max-width: 1000px)").matches) $("filters").open = false;
  $("query").addEventListener("submit", (event) => event.preventDefault());
  $("query").addEventListener("input", changed);
  $("query").addEventListener("reset", () => setTimeout(changed));
  $("limit").addEventListener("change", changed);
  $("previous").addEventListener("click", () => guarded(() => turn(-1)));
  $("next").addEventListener("click", () => guarded(() => turn(1)));
  $("keep-page").addEventListener("click", () => guarded(() => decide(state.rows.map((row) => row.row), true)));
  $("drop-page").addEventListener("click", () => guarded(() => decide(state.rows.map((row) => row.row), false)));
  $("undo-page").addEventListener("click", () => guarded(() => decide(state.rows.map((row) => row.row), null)));
  $("export").addEventListener("click", () => guarded(exportEdited));
  document.addEventListener("keydown", keyPressed);
  guarded(async () => {
    await readAbout();
    await Promise.all([showRows(), showHistogram(), showAgreement()]);
    document.body.dataset.ready = "yes"; // what tests wait for
  });
}

start();
