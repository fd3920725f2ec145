// The list of requests and its filters. The filters live in the address, so a view can be shared.
import { api, clockTag, clockTime, count, day, h, ms, seconds, usd } from "./dom.js";

const FIELDS = [
  ["service", "Service"], ["status", "Status"], ["model", "Model"], ["tenant", "Tenant"],
];
const LEAST = [["min_ttft_ms", "TTFT ≥ ms"], ["min_tpot_ms", "TPOT ≥ ms"], ["min_duration_ms", "Total ≥ ms"]];
export const FILTERS = ["q", "clock", "all", ...FIELDS.map(([n]) => n), ...LEAST.map(([n]) => n)];
const chosen = new Set();

export function filterForm(query, changed) {
  const set = (name, value) => { value ? query.set(name, value) : query.delete(name); changed(); };
  const text = (name, label, attributes) => {
    let wait;  // of this field alone: who goes on to the next one loses nothing
    return h("label", { class: name === "q" ? "wide" : "" }, label,
      h("input", { name, value: query.get(name) || "", ...attributes,
        oninput: (e) => { clearTimeout(wait); wait = setTimeout(() => set(name, e.target.value.trim()), 250); } }));
  };
  const select = (name, label, options = []) => h("label", {}, label,
    h("select", { name, onchange: (e) => set(name, e.target.value) },
      h("option", { value: "" }, "any"),
      options.map((o) => h("option", { value: o, selected: query.get(name) === o }, o))));
  return h("form", { class: "filters card", role: "search", onsubmit: (e) => e.preventDefault() },
    text("q", "Search names, attributes and events", { type: "search", placeholder: "worker-1, request id, error…", id: "search" }),
    FIELDS.map(([name, label]) => select(name, label, name === "status" ? ["ok", "error"] : [])),
    LEAST.map(([name, label]) => text(name, label, { type: "number", min: "0", step: "any", inputmode: "decimal" })));
}

function fillFacets(form, facets, query) {
  for (const [name, values] of Object.entries(facets)) {
    const box = form.querySelector(`select[name=${name}]`);
    if (!box || box.options.length === values.length + 1) continue;
    box.replaceChildren(h("option", { value: "" }, "any"),
      ...values.map((v) => h("option", { value: v, selected: query.get(name) === v }, v)));
  }
}

export function listView(main, query, changed, counters) {
  const body = h("tbody");
  const found = h("span", { class: "dim grow", role: "status" });
  const compare = h("button", { class: "primary", id: "compare", disabled: true,
    onclick: () => { location.hash = `#/compare/${[...chosen].join("/")}`; } }, "Compare two");
  const clock = h("select", { name: "clock", "aria-label": "Clock",
    onchange: (e) => { e.target.value ? query.set("clock", e.target.value) : query.delete("clock"); changed(); } },
    [["", "any clock"], ["measured", "measured"], ["simulated", "simulated"], ["mixed", "partly simulated"]]
      .map(([v, t]) => h("option", { value: v, selected: (query.get("clock") || "") === v }, t)));
  const form = filterForm(query, changed);
  const every = h("label", { class: "dim" }, h("input", { type: "checkbox", name: "all", checked: query.get("all") === "1",
    style: { minHeight: 0, marginRight: "6px" },
    onchange: (e) => { e.target.checked ? query.set("all", "1") : query.delete("all"); changed(); } }), "also probes");
  const head = [["", ""], ["Started", ""], ["Request", ""], ["Status", ""], ["TTFT", "num"], ["TPOT", "num opt"],
    ["Total", "num"], ["Prompt", "num opt"], ["Cached", "num opt"], ["Output", "num opt"], ["Price", "num opt"], ["Spans", "num opt"]];
  main.replaceChildren(h("div", { class: "bar" }, h("h1", {}, "Requests"), found, every, clock, compare), form,
    h("div", { class: "card" }, h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, head.map(([t, c]) => h("th", { class: c, scope: "col" }, t)))), body))),
    h("footer", {}, h("kbd", {}, "/"), " search   ", h("kbd", {}, "j"), " ", h("kbd", {}, "k"), " move   ",
      h("kbd", {}, "Enter"), " open   ", h("kbd", {}, "x"), " choose for comparison"));
  const pick = (id, on) => {
    on ? chosen.add(id) : chosen.delete(id);
    if (chosen.size > 2) chosen.delete(chosen.values().next().value);
    for (const box of body.querySelectorAll("input")) box.checked = chosen.has(box.value);
    compare.disabled = chosen.size !== 2;
  };
  const row = (t) => h("tr", { class: `go ${t.errors ? "bad" : ""}`, "data-id": t.trace_id,
      onclick: (e) => { if (e.target.tagName !== "INPUT") location.hash = `#/trace/${t.trace_id}`; } },
    h("td", {}, h("input", { type: "checkbox", value: t.trace_id, checked: chosen.has(t.trace_id), style: { minHeight: 0 },
      "aria-label": `Choose ${t.trace_id.slice(0, 8)} for comparison`, onchange: (e) => pick(t.trace_id, e.target.checked) })),
    h("td", {}, clockTime(t.start_ns), " ", h("small", { class: "opt" }, day(t.start_ns))),
    h("td", { class: "name" }, h("a", { href: `#/trace/${t.trace_id}` }, t.name), " ", h("small", { class: "mono opt" }, t.trace_id.slice(0, 8)), " ",
      clockTag(t.clock), t.tenant ? h("small", {}, ` ${t.tenant}`) : null),
    h("td", {}, t.errors ? h("span", { class: "tag bad" }, `${t.errors} error${t.errors > 1 ? "s" : ""}`) : h("span", { class: "tag ok" }, "ok")),
    h("td", { class: "num" }, seconds(t.ttft_s)), h("td", { class: "num opt" }, seconds(t.tpot_s)),
    h("td", { class: "num" }, ms(t.duration_ms)), h("td", { class: "num opt" }, count(t.input_tokens)),
    h("td", { class: "num opt" }, count(t.cached_tokens)), h("td", { class: "num opt" }, count(t.output_tokens)),
    h("td", { class: "num opt" }, usd(t.cost_usd)), h("td", { class: "num opt" }, count(t.num_spans)));
  let last = "", asked = 0;
  return async () => {
    const mine = ++asked;
    const data = await api(`api/traces?${query}`);
    if (mine !== asked) return;  // of filters that were changed meanwhile
    counters(data.counters);
    fillFacets(form, data.facets, query);
    compare.disabled = chosen.size !== 2;
    const said = JSON.stringify(data.traces);
    if (said === last) return;
    last = said;
    found.textContent = `${data.traces.length} shown, newest first`;
    const focused = document.activeElement?.closest?.("tr")?.dataset.id;
    body.replaceChildren(...data.traces.map(row));
    if (!data.traces.length) body.append(h("tr", {}, h("td", { colspan: 12, class: "empty" }, "No request fits. Send one with “kvmesh generate”, or loosen the filters.")));
    if (focused) body.querySelector(`tr[data-id="${focused}"] a`)?.focus();
  };
}
