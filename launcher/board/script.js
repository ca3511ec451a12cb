"use strict";

// What somebody chose is in the address, behind the #; `show` brings the page to it. Every handler only changes the
// address, so that links, back and forward, and a new load all end at the same page.

const data = JSON.parse(document.getElementById("data")?.textContent ?? '{"sheets": []}');
const by = (id) => document.getElementById(id);
const all = (css, within = document) => Array.from(within.querySelectorAll(css));
const NOTHING = "–";
const MOST = 8; // rows of a comparison
const FIRST = 100; // rows that are laid out until somebody asks for all: a sort of a thousand then takes no longer

// ---- state ---------------------------------------------------------------------------------------------

const LISTS = ["hide", "open", "mark"];

function read() {
  const told = location.hash.slice(1);
  const given = new URLSearchParams(told.startsWith("protocol-") ? `p=${told.slice(9)}` : told);
  const state = { p: given.get("p"), sort: given.get("sort") ?? "", q: given.get("q") ?? "", k: given.get("k") ?? "", compare: given.get("compare") === "1", rows: given.get("rows") ?? "", columns: {} };
  for (const name of LISTS) state[name] = (given.get(name) ?? "").split(",").filter(Boolean);
  for (const [name, value] of given) if (name.startsWith("f.") && value) state.columns[name.slice(2)] = value;
  if (state.p !== "all" && !sheets.some((sheet) => sheet.key === state.p)) state.p = sheets[0]?.key ?? "";
  return state;
}

function address(state) {
  const told = new URLSearchParams();
  if (state.p && state.p !== sheets[0]?.key) told.set("p", state.p);
  for (const name of ["sort", "q", "k", "rows"]) if (state[name]) told.set(name, state[name]);
  for (const name of LISTS) if (state[name].length) told.set(name, state[name].join(","));
  for (const [id, value] of Object.entries(state.columns)) if (value) told.set(`f.${id}`, value);
  if (state.compare) told.set("compare", "1");
  return `#${told}`;
}

// A step that one may want to go back from; typing replaces the step it continues.
function go(change, typing = false) {
  const next = address({ ...read(), ...change });
  if (next !== address(read())) history[typing ? "replaceState" : "pushState"](null, "", next);
  show();
}

const toggled = (list, item) => (list.includes(item) ? list.filter((other) => other !== item) : [...list, item]);

// ---- what the tables hold ------------------------------------------------------------------------------

// Cells are read once: sorting and filtering a thousand rows then touches no element that stays where it is.
function sheetOf(section) {
  const told = data.sheets.find((sheet) => sheet.key === section.dataset.protocol);
  const table = section.querySelector("table.board");
  const rows = Array.from(table.tBodies, (body) => {
    // without the names that every object has, which a filter may ask for
    const [cells, values, texts] = [Object.create(null), Object.create(null), Object.create(null)];
    for (const cell of body.rows[0].cells) if (cell.dataset.id) cells[cell.dataset.id] = cell;
    for (const [id, cell] of Object.entries(cells)) {
      values[id] = cell.dataset.sort ? Number(cell.dataset.sort) : null;
      texts[id] = cell.textContent.toLowerCase();
    }
    const { group, words, order } = body.dataset;
    const drawer = body.rows[1];
    drawer.hidden = true;
    return { body, drawer, cells, values, texts, group, words, order: Number(order), numbers: told.rows[group], shown: true };
  });
  return { ...told, section, table, rows, heads: all("thead th[data-id]", table), k: section.dataset.k ?? "", order: "", widths: "" };
}

// Of others' samples a filter looks at the name alone.
function othersOf(place) {
  const rows = Array.from(place.querySelector("table").tBodies[0].rows, (body) => {
    const name = body.cells[0].textContent.toLowerCase();
    const texts = Object.assign(Object.create(null), { experiment: name });
    return { body, words: name, texts, values: Object.create(null), numbers: { facts: {} }, settings: new Map() };
  });
  return { place, rows };
}

// ---- numbers -------------------------------------------------------------------------------------------

// about three significant figures, as Python's columns write them
function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NOTHING;
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return size >= 100 ? value.toFixed(1) : size >= 0.01 || !size ? value.toFixed(2) : value.toExponential(1);
}

const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

// Images and GPU-hours of each run's first snapshot at least as good as k, as launcher/board/reach.py reads them.
function reach(sheet, row, k) {
  const measured = row.numbers.histories.filter((history) => history.length);
  const found = measured.map((history) => history.find(([, score]) => (sheet.higher ? score >= k : score <= k))).filter(Boolean);
  const hours = found.map(([, , each]) => each).filter((each) => each !== null);
  return { images: mean(found.map(([images]) => images)), hours: hours.length === found.length ? mean(hours) : null, runs: found.length, of: measured.length };
}

function put(row, id, value, text, aside = "") {
  const cell = row.cells[id];
  cell.dataset.sort = value ?? "";
  row.values[id] = value;
  row.texts[id] = `${text} ${aside}`;
  cell.textContent = `${text} `;
  if (aside) cell.append(element("small", { textContent: aside }));
}

function setGoal(sheet, given) {
  const text = given || sheet.section.dataset.k || "";
  if (text === sheet.k) return;
  sheet.k = text;
  for (const row of sheet.rows) {
    const found = reach(sheet, row, text === "" ? NaN : Number(text));
    put(row, "reach_images", found.images, found.images === null ? NOTHING : Math.round(found.images).toLocaleString("en-US"), found.runs && found.runs < found.of ? `${found.runs} of ${found.of}` : "");
    put(row, "reach_hours", found.hours, number(found.hours));
  }
  sheet.order = ""; // what it was sorted by may have changed
}

// ---- sorting -------------------------------------------------------------------------------------------

// A row without a value goes last in both directions, and equal ones stay in the order of the ranking.
function sortBy(sheet, given) {
  const [wanted, direction] = given.split(":");
  const id = sheet.heads.some((head) => head.dataset.id === wanted && head.ariaSort) ? wanted : "rank";
  const order = id === wanted ? direction : "ascending";
  if (sheet.order === `${id}:${order}`) return;
  sheet.order = `${id}:${order}`;
  for (const head of sheet.heads) if (head.ariaSort) head.ariaSort = head.dataset.id === id ? order : "none";
  const sign = order === "ascending" ? 1 : -1;
  const sorted = [...sheet.rows].sort((a, b) => {
    const [x, y] = [a.values[id], b.values[id]];
    return (x === null) - (y === null) || (x === null ? 0 : sign * (x - y)) || a.order - b.order;
  });
  sheet.rows = sorted;
}

// The rows that fit, in their order, and no more of them than asked for.
function place(sheet, limit) {
  const wanted = sheet.rows.filter((row) => row.shown);
  const placed = wanted.slice(0, limit).map((row) => row.body);
  const bodies = sheet.table.tBodies;
  if (bodies.length !== placed.length || placed.some((body, i) => body !== bodies[i])) sheet.table.replaceChildren(sheet.table.tHead, ...placed);
  const more = sheet.section.querySelector(".rest");
  more.hidden = wanted.length <= placed.length;
  more.textContent = `Show all ${wanted.length} rows`;
}

function nextOrder(head) {
  const first = head.querySelector(".sort").dataset.first;
  return head.ariaSort === "none" ? first : head.ariaSort === "ascending" ? "descending" : "ascending";
}

// ---- filters -------------------------------------------------------------------------------------------

const SIZES = { k: 1e3, m: 1e6, g: 1e9 };
const COMPARE = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b };

function quantity(text) {
  const found = /^([+-]?[\d_]*\.?\d+(?:e[+-]?\d+)?|[+-]?\d+\.)([kmg]?)$/i.exec(text);
  return found ? Number(found[1].replaceAll("_", "")) * (SIZES[found[2].toLowerCase()] ?? 1) : null;
}

const settingsOf = (group) => new Map([...data.settings.common, ...(data.settings.own[group] ?? [])]);

function fits(value, text, sign, wanted) {
  const bound = quantity(wanted);
  if (sign in COMPARE) return value !== null && bound !== null && COMPARE[sign](value, bound);
  const same = sign.endsWith("~") ? text.includes(wanted) : text.trim() === wanted || (value !== null && value === bound);
  return sign.startsWith("!") ? !same : same;
}

// One term of the filter: a word, -word, or key, sign and value.
function term(text) {
  const parts = /^(-?)([a-z_][\w.]*)(!=|!~|<=|>=|=|~|<|>)(.*)$/i.exec(text);
  const bare = text.replaceAll('"', "");
  if (!parts) {
    const negated = bare.startsWith("-") && bare.length > 1;
    return (row) => row.words.includes(negated ? bare.slice(1) : bare) !== negated;
  }
  const [, minus, key, sign, rest] = parts;
  const values = rest.replaceAll('"', "").split(",");
  return (row) => {
    let [value, told] = [row.values[key] ?? null, row.texts[key]];
    // a number as it is, as in every command, not as its cell is written
    if (value !== null) told = row.cells[key].dataset.sort;
    if (told === undefined) {
      row.settings ??= settingsOf(row.group);
      told = String(row.settings.get(key) ?? "").toLowerCase();
      value = quantity(told);
    }
    const known = Object.hasOwn(row.numbers.facts, key) ? row.numbers.facts[key] : null;
    const given = known?.map((each) => [quantity(each), each.toLowerCase()]) ?? [[value, told]];
    const each = ([own, words]) => (sign.startsWith("!") ? values.every((one) => fits(own, words, sign, one)) : values.some((one) => fits(own, words, sign, one)));
    const found = sign.startsWith("!") ? given.every(each) : given.some(each);
    return found !== (minus === "-");
  };
}

const terms = (text) => (text.toLowerCase().match(/-?(?:[^\s"]+|"[^"]*")+/g) ?? []).map(term);

function columnTerm(id, text) {
  const [, sign, wanted] = /^\s*(!=|!~|<=|>=|=|~|<|>)?\s*(.*?)\s*$/.exec(text.toLowerCase());
  return wanted === "" ? () => true : (row) => id in row.texts && fits(row.values[id], row.texts[id], sign ?? "~", wanted);
}

function filter(state, shownSheets) {
  const wanted = [...terms(state.q), ...Object.entries(state.columns).map(([id, text]) => columnTerm(id, text))];
  let [left, of] = [0, 0];
  for (const sheet of shownSheets) {
    for (const row of sheet.rows) {
      row.shown = wanted.every((holds) => holds(row));
      left += row.shown;
      of += 1;
    }
  }
  for (const { place, rows } of others) {
    for (const row of rows) row.body.hidden = !wanted.every((holds) => holds(row));
    place.hidden = rows.every((row) => row.body.hidden);
  }
  by("count").textContent = wanted.length ? `${left} of ${of} rows` : "";
}

// ---- columns -------------------------------------------------------------------------------------------

function hideColumns(sheet, hidden) {
  const widths = hidden.join();
  if (sheet.widths === widths) return;
  sheet.widths = widths;
  const cells = [...all("thead [data-id]", sheet.table), ...sheet.rows.flatMap((row) => Object.values(row.cells))];
  for (const cell of cells) cell.hidden = hidden.includes(cell.dataset.id);
}

function offerColumns(shownSheets, hidden) {
  const offered = [...shownSheets.map((sheet) => sheet.key), ...hidden].join();
  if (by("columns").dataset.offered === offered) return;
  by("columns").dataset.offered = offered;
  const known = new Map(shownSheets.flatMap((sheet) => sheet.heads.map((head) => [head.dataset.id, head.textContent.trim()])));
  known.delete("experiment"); // it holds the name and opens the row
  by("columns").replaceChildren(
    ...Array.from(known, ([id, label]) => {
      const box = element("input", { type: "checkbox", checked: !hidden.includes(id), value: id });
      box.addEventListener("change", () => {
        by("columns").dataset.offered = ""; // the boxes now say what nobody offered
        go({ hide: toggled(read().hide, id) });
        by("columns").querySelector(`[value="${CSS.escape(id)}"]`)?.focus();
      });
      return element("label", {}, box, ` ${label}`);
    }),
  );
}

// ---- drawers -------------------------------------------------------------------------------------------

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const shrinking = new ResizeObserver((entries) => {
  for (const { target } of entries) target.classList.toggle("shrunk", target.clientWidth < target.naturalWidth);
});

// What opens below a row is text until then, which a browser without scripts reads as elements.
function drawerOf(row) {
  const text = row.drawer.querySelector("noscript");
  if (!text) return row.drawer;
  const made = element("template", { innerHTML: text.textContent }).content.querySelector(".inside");
  text.replaceWith(made);
  made.querySelector(".settings p").remove();
  list(made.querySelector(".settings dl"), row.group);
  for (const image of all(".samples", made)) shrinking.observe(image);
  for (const button of all(".parent", made)) button.addEventListener("click", () => goToRun(button.dataset.run));
  return row.drawer;
}

function setOpen(row, open) {
  if (open) drawerOf(row);
  row.body.querySelector(".toggle").ariaExpanded = String(open);
  row.drawer.hidden = !open;
}

function list(target, group) {
  const variant = target.dataset.variant.split("\n");
  const settings = Array.from(settingsOf(group)).sort(([a], [b]) => (a < b ? -1 : 1));
  target.append(
    ...settings.map(([key, value]) => {
      const line = element("div", {}, element("dt", { textContent: key }), element("dd", { textContent: value }));
      line.classList.toggle("differs", variant.includes(`${key}=${value}`));
      return line;
    }),
  );
}

function goToRun(id) {
  for (const sheet of sheets) {
    const row = sheet.rows.find((each) => each.words.split(" ").includes(id.toLowerCase()));
    if (!row) continue;
    const now = read();
    go({ p: now.p === "all" ? "all" : sheet.key, q: "", columns: {}, open: [...new Set([...now.open, row.group])] });
    if (!row.body.isConnected) go({ rows: "all" }, true);
    row.body.querySelector(".toggle").focus();
    row.body.scrollIntoView({ block: "start" });
    return;
  }
}

// ---- comparison ----------------------------------------------------------------------------------------

const nameOf = (row) => [row.body.querySelector(".toggle").textContent, ...all(".setting", row.body.rows[0]).map((each) => each.textContent)].join(" ");

// Standard error of a difference: of the protocol's own score from the jackknife where both kept its blocks, whose samples
// are paired.
function errorOf(sheet, name, first, other) {
  const [a, b] = [first.numbers.left_out, other.numbers.left_out];
  if (name === sheet.own && a.length > 1 && a.length === b.length) {
    const gaps = a.map((each, i) => b[i] - each);
    const middle = mean(gaps);
    return Math.sqrt(((gaps.length - 1) / gaps.length) * gaps.reduce((sum, gap) => sum + (gap - middle) ** 2, 0));
  }
  const [x, y] = [first.numbers.scores[name]?.[1], other.numbers.scores[name]?.[1]];
  return x && y ? Math.hypot(x, y) : null;
}

function scoreCell(sheet, name, first, row) {
  const own = row.numbers.scores[name];
  if (!own) return element("td", { textContent: NOTHING });
  const cell = element("td", { textContent: number(own[0]) });
  const base = first.numbers.scores[name];
  if (row !== first && base) {
    const gap = own[0] - base[0];
    const error = errorOf(sheet, name, first, row);
    const told = gap === 0 ? "the same" : `${gap > 0 ? "+" : "−"}${number(Math.abs(gap))}`;
    cell.append(element("small", { className: "gap", textContent: `${told}${error === null ? "" : ` ± ${number(error)}`}` }));
  }
  return cell;
}

function comparedTable(caption, rows, lines) {
  const head = element("tr", {}, element("td", {}), ...rows.map((row) => element("th", { scope: "col", textContent: nameOf(row) })));
  const body = lines.map(([name, cells]) => element("tr", {}, element("th", { scope: "row", textContent: name }), ...cells));
  return element("table", { className: "compared" }, element("caption", { textContent: caption }), element("thead", {}, head), element("tbody", {}, ...body));
}

function compared(sheet, rows) {
  const first = rows[0];
  const names = [...new Set([sheet.metric, ...rows.flatMap((row) => Object.keys(row.numbers.scores).sort())])];
  const scores = names.map((name) => [name, rows.map((row) => scoreCell(sheet, name, first, row))]);
  const settings = rows.map((row) => settingsOf(row.group));
  const keys = [...new Set(settings.flatMap((each) => [...each.keys()]))].sort();
  const differing = keys.filter((key) => settings.some((each) => each.get(key) !== settings[0].get(key)));
  const config = differing.map((key) => [key, settings.map((each) => element("td", { textContent: each.get(key) ?? "not there" }))]);
  const grids = rows.map((row) => {
    const found = drawerOf(row).querySelector(".samples");
    const cell = element("td", {});
    if (found) cell.append(element("img", { className: "samples", src: found.src, alt: found.alt }));
    else cell.textContent = "no samples kept";
    return cell;
  });
  return [
    comparedTable("Scores, and their difference from the first row ± its standard error", rows, scores),
    comparedTable(differing.length ? "Config, where it differs" : "Config: no difference", rows, config),
    comparedTable("Samples, drawn from the same seeds where the protocol is the same", rows, [["samples", grids]]),
  ];
}

function markRows(sheet, mark) {
  if (sheet.marks === mark.join()) return;
  sheet.marks = mark.join();
  for (const row of sheet.rows) {
    const box = row.body.querySelector(".pick input");
    box.checked = mark.includes(row.group);
    box.disabled = !box.checked && mark.length >= MOST;
  }
}

// The marked rows of one table, in the order of marking.
function marked(state, shownSheets) {
  for (const sheet of shownSheets) {
    const rows = state.mark.map((group) => sheet.rows.find((row) => row.group === group)).filter(Boolean);
    if (rows.length > 1) return { sheet, rows: rows.slice(0, MOST) };
  }
  return null;
}

function showComparison(state, shownSheets) {
  const found = marked(state, shownSheets);
  by("compare").disabled = !found;
  by("compare").textContent = state.mark.length ? `Compare ${state.mark.length}` : "Compare";
  const dialog = by("comparison");
  if (!state.compare || !found) return dialog.open && dialog.close();
  by("compared").replaceChildren(...compared(found.sheet, found.rows));
  for (const image of all(".samples", dialog)) shrinking.observe(image);
  if (!dialog.open) dialog.showModal();
}

// ---- the page as the address says ----------------------------------------------------------------------

const sheets = all("section.sheet").map(sheetOf);
const others = all("section.sheet .samples-of-others, section.alone").map(othersOf);

function setText(input, text) {
  if (input.value !== text) input.value = text;
}

function show() {
  if (!sheets.length) return;
  const state = read();
  const shownSheets = sheets.filter((sheet) => state.p === "all" || sheet.key === state.p);
  for (const sheet of sheets) sheet.section.hidden = !shownSheets.includes(sheet);
  by("protocol").value = state.p;
  setText(by("filter"), state.q);
  setText(by("k"), state.k || shownSheets[0].section.dataset.k || "");
  for (const input of all("[data-filter]")) setText(input, state.columns[input.dataset.filter] ?? "");
  if (Object.keys(state.columns).length) setColumnFilters(true);
  const open = state.open.includes("all");
  for (const sheet of shownSheets) {
    setGoal(sheet, state.k);
    sortBy(sheet, state.sort || "rank:ascending");
    hideColumns(sheet, state.hide);
  }
  filter(state, shownSheets);
  for (const sheet of shownSheets) {
    place(sheet, state.rows === "all" ? Infinity : FIRST);
    for (const row of sheet.rows) {
      const wanted = (open && row.body.isConnected) || state.open.includes(row.group);
      if (wanted !== Boolean(row.open)) setOpen(row, (row.open = wanted));
    }
    markRows(sheet, state.mark);
  }
  by("expand").textContent = open ? "Close all" : "Open all";
  if (!by("columns").contains(document.activeElement)) offerColumns(shownSheets, state.hide);
  showComparison(state, shownSheets);
}

function setColumnFilters(on) {
  by("by-column").ariaPressed = String(on);
  for (const row of all("tr.filters")) row.hidden = !on;
}

function ago(seconds) {
  for (const [size, unit] of [[86400, "days"], [3600, "h"], [60, "min"]]) {
    if (seconds >= 2 * size) return `${Math.floor(seconds / size)} ${unit} ago`;
  }
  return "just now";
}

function tellAge() {
  for (const time of all("time[data-time]")) {
    time.title ||= time.textContent;
    time.textContent = ago(Date.now() / 1000 - Number(time.dataset.time));
  }
}

// A server says by its ETag whether the page is still the newest; a reload keeps the address, hence the state.
async function watch() {
  const tag = async () => (await fetch(location.pathname + location.search, { cache: "no-cache" })).headers.get("ETag");
  const first = await tag();
  const look = async () => {
    const now = await tag().catch(() => null); // a server that is away, or asks for its token, has nothing newer
    by("reload").hidden = now === null || now === first;
  };
  setInterval(look, 15000);
  addEventListener("focus", look);
}

// ---- hands -----------------------------------------------------------------------------------------------

function closeOne() {
  const state = read();
  const inside = document.activeElement?.closest("tbody[data-group]");
  if (state.compare) return go({ compare: false });
  if (document.activeElement === by("filter")) return go({ q: "" }, true);
  if (by("picker").open) by("picker").open = false;
  else if (document.activeElement?.dataset.filter) go({ columns: { ...state.columns, [document.activeElement.dataset.filter]: "" } }, true);
  else if (inside) {
    go({ open: state.open.filter((group) => group !== inside.dataset.group && group !== "all") });
    inside.querySelector(".toggle").focus();
  }
}

function step(distance) {
  const toggles = all("section.sheet:not([hidden]) tbody .toggle");
  const at = toggles.findIndex((toggle) => toggle.closest("tbody").contains(document.activeElement));
  toggles[Math.min(toggles.length - 1, Math.max(0, at < 0 ? 0 : at + distance))]?.focus();
}

function listen() {
  by("protocol").addEventListener("change", () => go({ p: by("protocol").value, k: "" }));
  by("filter").addEventListener("input", () => go({ q: by("filter").value }, true));
  by("k").addEventListener("input", () => go({ k: by("k").value }, true));
  by("by-column").addEventListener("click", () => {
    const on = by("by-column").ariaPressed !== "true";
    setColumnFilters(on);
    if (!on) go({ columns: {} });
  });
  by("expand").addEventListener("click", () => go({ open: read().open.includes("all") ? [] : ["all"] }));
  by("compare").addEventListener("click", () => go({ compare: true }));
  by("close").addEventListener("click", () => go({ compare: false }));
  by("comparison").addEventListener("cancel", (event) => { event.preventDefault(); go({ compare: false }); });
  for (const { section, table } of sheets) {
    section.querySelector(".rest").addEventListener("click", () => go({ rows: "all" }));
    table.tHead.addEventListener("click", (event) => {
      const head = event.target.closest(".sort") && event.target.closest("th");
      if (head) go({ sort: `${head.dataset.id}:${nextOrder(head)}` });
    });
    table.tHead.addEventListener("input", (event) => {
      const { filter: id } = event.target.dataset;
      if (id) go({ columns: { ...read().columns, [id]: event.target.value } }, true);
    });
    table.addEventListener("click", (event) => {
      const body = event.target.closest("tr.row")?.parentElement;
      if (!body) return;
      if (event.target.matches(".pick input")) return go({ mark: toggled(read().mark, body.dataset.group) });
      if (!event.target.closest(".pick") && (event.target.closest(".toggle") || !String(getSelection()))) openOrClose(body.dataset.group);
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return closeOne();
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox]), select, textarea") || read().compare) return;
    const body = document.activeElement?.closest("tbody[data-group]");
    const keys = {
      "/": () => by("filter").focus(),
      j: () => step(1),
      k: () => step(-1),
      x: () => body?.querySelector(".pick input").click(),
      c: () => by("compare").click(),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  addEventListener("popstate", show);
}

function openOrClose(group) {
  const { open } = read();
  const shown = sheets.flatMap((sheet) => sheet.rows.filter((row) => row.open).map((row) => row.group));
  go({ open: toggled(open.includes("all") ? [...new Set(shown)] : open, group) });
}

for (const image of all(".samples")) shrinking.observe(image);
by("reload").addEventListener("click", () => location.reload());
if (sheets.length) listen();
show();
if (location.protocol.startsWith("http")) watch();
tellAge();
setInterval(tellAge, 30000);
