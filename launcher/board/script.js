"use strict";

// Every cell carries the number it sorts by; an empty one goes last in both directions, and equal ones
// stay in the order of the ranking.
function sortBy(table, button) {
  const header = button.closest("th");
  const was = header.getAttribute("aria-sort");
  const order = was === "none" ? button.dataset.first : was === "ascending" ? "descending" : "ascending";
  for (const other of table.querySelectorAll("thead th[aria-sort]")) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const key = (body) => body.rows[0].cells[button.dataset.column].dataset.sort;
  const bodies = Array.from(table.tBodies).sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    const missing = (x === "") - (y === "");
    const gap = x === "" || y === "" ? 0 : sign * (Number(x) - Number(y));
    return missing || gap || a.dataset.order - b.dataset.order;
  });
  table.append(...bodies);
}

function setOpen(toggle, open) {
  toggle.setAttribute("aria-expanded", String(open));
  document.getElementById(toggle.getAttribute("aria-controls")).hidden = !open;
}

function ago(seconds) {
  for (const [size, unit] of [[86400, "days"], [3600, "h"], [60, "min"]]) {
    if (seconds >= 2 * size) return `${Math.floor(seconds / size)} ${unit} ago`;
  }
  return "just now";
}

function tellAge() {
  for (const time of document.querySelectorAll("time[data-time]")) {
    time.title ||= time.textContent;
    time.textContent = ago(Date.now() / 1000 - Number(time.dataset.time));
  }
}

function filter(words, count) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const bodies = Array.from(document.querySelectorAll("tbody[data-words]"));
  for (const body of bodies) {
    body.hidden = !wanted.every((word) => body.dataset.words.includes(word));
  }
  const left = bodies.filter((body) => !body.hidden).length;
  count.textContent = wanted.length ? `${left} of ${bodies.length} rows` : "";
}

const toggles = Array.from(document.querySelectorAll(".toggle"));
for (const toggle of toggles) {
  setOpen(toggle, false); // without scripts every drawer stays open
  toggle.addEventListener("click", () => setOpen(toggle, toggle.getAttribute("aria-expanded") === "false"));
}
for (const row of document.querySelectorAll("tr.row")) {
  row.addEventListener("click", (event) => {
    if (!event.target.closest("button") && !String(getSelection())) row.querySelector(".toggle").click();
  });
}
for (const button of document.querySelectorAll(".sort")) {
  button.addEventListener("click", () => sortBy(button.closest("table"), button));
}

const shrinking = new ResizeObserver((entries) => {
  for (const { target } of entries) target.classList.toggle("shrunk", target.clientWidth < target.naturalWidth);
});
for (const image of document.querySelectorAll(".samples")) shrinking.observe(image);

const box = document.getElementById("filter");
if (box) {
  const count = document.getElementById("count");
  const expand = document.getElementById("expand");
  box.addEventListener("input", () => filter(box.value, count));
  expand.addEventListener("click", () => {
    const open = expand.textContent === "Open all";
    for (const toggle of toggles) setOpen(toggle, open);
    expand.textContent = open ? "Close all" : "Open all";
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== box) {
      event.preventDefault();
      box.focus();
    } else if (event.key === "Escape" && document.activeElement === box) {
      box.value = "";
      filter("", count);
    }
  });
}

tellAge();
setInterval(tellAge, 30000);
