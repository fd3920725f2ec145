// Which view is shown, the theme, the keyboard, and the clock that keeps a view live.
import { h } from "./dom.js";
import { latencyView } from "./latency.js";
import { listView } from "./list.js";
import { compareView, traceView } from "./trace.js";

const REFRESH_MS = 1500;
const main = document.getElementById("main");
const live = document.getElementById("live");
let refresh = null;
let turn = 0;
let query = new URLSearchParams();

function counters(found) {
  const lost = Object.entries(found).filter(([name]) => name.startsWith("dropped")).reduce((sum, [, n]) => sum + n, 0);
  const place = document.getElementById("lost");
  place.hidden = !lost;
  place.textContent = `${lost.toLocaleString("en")} spans dropped`;
}

async function guarded(work) {
  try {
    document.getElementById("failed")?.remove();
    await work();
  } catch (error) {
    document.getElementById("failed")?.remove();
    main.prepend(h("p", { class: "note", role: "alert", id: "failed" }, String(error.message)));
  }
}

function changed() {
  const [path] = location.hash.slice(1).split("?");
  const text = query.toString();
  history.replaceState(null, "", `#${path || "/"}${text ? `?${text}` : ""}`);
  if (refresh) guarded(refresh);
}

async function show() {
  const mine = ++turn;
  const [path, text] = (location.hash.slice(1) || "/").split("?");
  const [view, ...ids] = path.split("/").filter(Boolean);
  query = new URLSearchParams(text || "");
  refresh = null;
  for (const link of document.querySelectorAll("nav a")) {
    const on = link.dataset.view === (view || "list") || (view === "trace" && link.dataset.view === "list");
    on ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  if (view === "trace") await guarded(() => traceView(main, ids[0]));
  else if (view === "compare") await guarded(() => compareView(main, ids));
  else {
    refresh = view === "latency" ? latencyView(main, query, changed) : listView(main, query, changed, counters);
    await guarded(refresh);
  }
  if (mine === turn) { document.body.dataset.view = view || "list"; scrollTo(0, 0); }
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("theme", name);
  if (refresh) guarded(refresh);
}

document.documentElement.dataset.theme = localStorage.getItem("theme")
  || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click", () =>
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
live.addEventListener("click", () => live.setAttribute("aria-pressed", String(live.getAttribute("aria-pressed") !== "true")));
addEventListener("hashchange", show);
addEventListener("resize", () => refresh && guarded(refresh));
addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) && event.target.type !== "checkbox";
  if (event.key === "Escape") { typing ? event.target.blur() : document.body.dataset.view !== "list" && (location.hash = "#/"); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); document.getElementById("search")?.focus(); }
  if (event.key === "j" || event.key === "k") {
    const stops = [...document.querySelectorAll("tbody tr.go td a, .wrow")];
    const now = stops.indexOf(document.activeElement);
    stops[Math.max(0, Math.min(stops.length - 1, now + (event.key === "j" ? 1 : -1)))]?.focus();
  }
  if (event.key === "x") document.activeElement?.closest?.("tr")?.querySelector("input[type=checkbox]")?.click();
});

async function keepLive() {
  if (refresh && !document.hidden && live.getAttribute("aria-pressed") === "true") await guarded(refresh);
  setTimeout(keepLive, REFRESH_MS);
}

await show();
setTimeout(keepLive, REFRESH_MS);
