// Elements, numbers and colours. Text only ever enters as text, so no span can add markup.

export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}

export const ms = (value) =>
  value == null ? "–" : value >= 1000 ? `${(value / 1000).toFixed(value >= 10000 ? 1 : 2)} s`
    : value >= 100 ? `${value.toFixed(0)} ms` : value >= 1 ? `${value.toFixed(1)} ms`
      : `${(value * 1000).toFixed(0)} µs`;
export const seconds = (value) => (value == null ? "–" : ms(value * 1000));
export const count = (value) => (value == null ? "–" : value.toLocaleString("en"));
// Of a request a price is mostly some millionths of a dollar: digits, and no row of zeros.
export const usd = (value) => (value == null ? "–" : value && Math.abs(value) < 1e-3
  ? `${digits(value * 1e6)} µ$` : `$${digits(Number(value))}`);
const digits = (value) => value.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
export function bytes(value) {
  if (!value) return "0 B";
  const power = Math.min(3, Math.floor(Math.log2(value) / 10));
  const scaled = value / 1024 ** power;
  return `${scaled >= 100 || !power ? scaled.toFixed(0) : scaled.toFixed(1)} ${["B", "KiB", "MiB", "GiB"][power]}`;
}
export const clockTime = (ns) => new Date(ns / 1e6).toLocaleTimeString("en-GB");
export const day = (ns) => new Date(ns / 1e6).toLocaleDateString("en-GB", { day: "numeric", month: "short" });
// Labels of an axis of Unix seconds, 24-hour, with the day at the first tick and wherever it changes.
export function axisTimes(ticks, step) {
  let before = "";
  return ticks.map((at) => {
    const part = step < 1 ? (at % 1).toFixed(step < .1 ? 2 : 1).slice(1) : "";
    const date = day(at * 1e9), time = clockTime(at * 1e9).slice(0, step < 60 ? 8 : 5) + part;
    const label = step >= 86400 ? date : date === before ? time : `${time}\n${date}`;
    before = date;
    return label;
  });
}

const SERVICES = ["gateway", "router", "tokenizer", "worker", "kvcache"];
export function serviceColour(service) {
  const name = service.replace("kvmesh-", "");
  return `var(--${SERVICES.includes(name) ? name : "other"})`;
}
export const PIECES = {
  queue: "--queue", tokenize: "--tokenize", route: "--route", "KV fetch": "--kv",
  prefill: "--prefill", "hand-over": "--hand", "first step": "--step", other: "--rest",
};

export async function api(path) {
  const response = await fetch(path);
  const body = await response.json();
  if (!response.ok) throw new Error(body.error || response.statusText);
  return body;
}

export function clockTag(clock) {
  if (clock === "measured" || !clock) return null;
  return h("span", { class: "tag sim", title: "Times from a model of a device, not from a clock" },
    clock === "mixed" ? "partly simulated" : "simulated");
}

const tip = document.getElementById("tip");
export function tipped(node, text) {
  const show = (event) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = node.getBoundingClientRect();
    const x = event.clientX ?? box.left, y = box.bottom + 8;
    tip.style.left = `${Math.max(6, Math.min(x, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.min(y, innerHeight - tip.offsetHeight - 6)}px`;
  };
  node.addEventListener("mousemove", show);
  node.addEventListener("focus", show);
  for (const name of ["mouseleave", "blur"]) node.addEventListener(name, () => { tip.hidden = true; });
  node.setAttribute("aria-label", text);
  return node;
}
