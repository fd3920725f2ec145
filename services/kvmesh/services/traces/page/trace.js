// One trace: its figures, TTFT, decode steps, waterfall, the router's choice. Two of them side by side.
import { api, bytes, clockTag, clockTime, count, day, h, ms, PIECES, seconds, serviceColour, tipped, usd } from "./dom.js";

export async function traceView(main, id) {
  const view = await api(`api/traces/${id}`);
  const full = view.summary.trace_id;
  main.replaceChildren(
    h("div", { class: "bar" }, h("h1", {}, view.summary.name), clockTag(view.summary.clock),
      h("span", { class: "dim grow" }, `${clockTime(view.summary.start_ns)}, ${day(view.summary.start_ns)}  `, h("span", { class: "mono" }, full)),
      view.linked.length ? h("a", { href: `#/compare/${full}/${view.linked[0].trace_id}` }, "Compare with linked") : null,
      download(full, "chrome", "Perfetto JSON"), download(full, "otlp", "OTLP JSON")),
    ...links(view), ...parts(view, false));
}

export async function compareView(main, ids) {
  if (ids.length !== 2) {
    main.replaceChildren(h("h1", {}, "Compare"), h("div", { class: "card empty" },
      "Choose two requests in the list with the boxes at the left, then “Compare two”."));
    return;
  }
  const views = await Promise.all(ids.map((id) => api(`api/traces/${id}`)));
  const scale = Math.max(...views.map((v) => v.total_ms));
  const clocks = new Set(views.map((v) => v.summary.clock));
  main.replaceChildren(h("div", { class: "bar" }, h("h1", {}, "Side by side"), h("span", { class: "dim" }, `both on a scale of ${ms(scale)}`)),
    clocks.size > 1 ? h("p", { class: "note" }, "One of these two has simulated times: compare their shape, do not add them up.") : "",
    h("div", { class: "two" }, views.map((view) => h("section", { "aria-label": view.summary.trace_id },
      h("div", { class: "bar" }, h("h2", { style: { margin: 0 } }, h("a", { href: `#/trace/${view.summary.trace_id}` }, view.summary.name), " ",
        h("small", { class: "mono" }, view.summary.trace_id.slice(0, 8))), clockTag(view.summary.clock),
      hit(view.summary)), ...parts(view, true, scale)))));
}

const hit = (s) => s.input_tokens ? h("span", { class: "tag", style: { background: "var(--accent-soft)", color: "var(--accent)" } },
  s.cached_tokens ? `cache hit, ${Math.round(100 * s.cached_tokens / s.input_tokens)} %` : "cache miss") : null;

const download = (id, format, label) => h("a", { href: `api/traces/${id}/export?format=${format}`,
  download: `${id.slice(0, 8)}.${format}.json`, "data-export": format }, label);

function links(view) {
  return view.linked.map((other) => h("p", { class: other.clock === "measured" ? "card" : "note", "data-linked": other.trace_id },
    other.clock === "measured" ? "Linked: " : "A simulated twin of this request: ",
    h("a", { href: `#/trace/${other.trace_id}` }, other.name), ` (${other.clock}, ${ms(other.duration_ms)}) `,
    h("a", { href: `#/compare/${view.summary.trace_id}/${other.trace_id}` }, "side by side")));
}

function parts(view, brief, scale) {
  return [facts(view), ttft(view), decode(view), waterfall(view, scale || view.total_ms), brief ? null : routes(view)].filter(Boolean);
}

function facts(view) {
  const s = view.summary, kv = view.kv, cost = view.cost;
  const split = ["queue", "prefill", "decode", "kv"].filter((p) => `kvmesh.cost.${p}_usd` in cost)
    .map((p) => `${p} ${usd(cost[`kvmesh.cost.${p}_usd`])}`).join(", ");
  const moved = (wire, raw) => wire ? [bytes(wire), h("small", {}, raw ? `on the wire, ${bytes(raw)} raw (${(raw / wire).toFixed(1)}x)` : "on the wire")] : "none";
  const rows = [
    ["TTFT", seconds(s.ttft_s)], ["TPOT", seconds(s.tpot_s)], ["Total", ms(s.duration_ms)],
    ["Prompt", [count(s.input_tokens), h("small", {}, "tokens")]],
    ["Cached", [count(s.cached_tokens), h("small", {}, s.input_tokens ? `${Math.round(100 * (s.cached_tokens || 0) / s.input_tokens)} % of the prompt` : "tokens")]],
    ["Output", [count(s.output_tokens), h("small", {}, "tokens")]],
    ["KV fetched", moved(kv.fetched_wire, kv.fetched_raw)], ["KV stored", moved(kv.stored_wire, kv.stored_raw)],
    kv.tail_wire ? ["KV tail", [bytes(kv.tail_wire), h("small", {}, "unfinished block, not coded")]] : null,
    "kvmesh.cost.usd" in cost ? ["Price", [usd(cost["kvmesh.cost.usd"]), h("small", {}, split), cost["kvmesh.cost.kind"] === "simulated" ? clockTag("simulated") : null]] : null,
    s.tenant ? ["Tenant", s.tenant] : null,
  ].filter(Boolean);
  return h("div", { class: "card" }, h("dl", { class: "facts" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
}

function ttft(view) {
  if (!view.ttft.length) return null;
  const total = view.ttft.reduce((sum, piece) => sum + piece.ms, 0);
  return h("section", { class: "card", id: "ttft" }, h("h2", {}, "Time to first token ", h("small", {}, ms(total)), " ", view.summary.clock === "simulated" ? clockTag("simulated") : null),
    h("div", { class: "stack" }, view.ttft.map((piece) => tipped(h("span", {
      "data-piece": piece.name, style: { flex: `${piece.ms} 1 0`, background: `var(${PIECES[piece.name]})` } },
      piece.ms / total > .09 ? piece.name : ""), `${piece.name}: ${ms(piece.ms)}, ${(100 * piece.ms / total).toFixed(0)} %`))),
    h("div", { class: "legend" }, view.ttft.map((piece) => h("span", {}, h("i", { class: "dot", style: { background: `var(${PIECES[piece.name]})` } }),
      `${piece.name} `, h("b", {}, ms(piece.ms)))),
      view.after_first_ms != null ? h("span", {}, "after the first token, the hand-over took ", h("b", {}, ms(view.after_first_ms))) : null));
}

function decode(view) {
  if (!view.decode.length) return null;
  const most = Math.max(...view.decode.map((w) => w.longest_ms));
  const stalls = view.decode.filter((w) => w.stall).length;
  return h("section", { class: "card", id: "decode" }, h("h2", {}, "Decode steps ", h("small", {},
    `longest wait for a token in each stretch, up to ${ms(most)}; ${stalls ? `${stalls} with a stall` : "no stall"}`)),
    h("div", { class: "strip" }, view.decode.map((w) => tipped(h("button", { class: w.stall ? "stall" : "",
      style: { height: `${Math.max(5, 100 * w.longest_ms / most)}%`, flex: `${w.tokens} 1 0` } }),
      `${w.tokens} tokens from ${ms(w.start_ms)}: ${ms(w.token_ms)} each, longest ${ms(w.longest_ms)}${w.stall ? ", stalled" : ""}`))));
}

function waterfall(view, scale) {
  const marks = [0, .25, .5, .75, 1].map((part) => h("span", {}, ms(scale * part).replace("0 µs", "0")));
  const services = [...new Set(view.rows.map((row) => row.service))];
  return h("section", { class: "card water" }, h("h2", {}, "Waterfall ", h("small", {}, `${view.rows.length} spans; solid and underlined: critical path`)),
    h("div", { class: "axis" }, h("span", {}), h("span", {}), h("span", {}, marks), h("span", {})),
    h("div", { id: "rows" }, view.rows.flatMap((row) => wrow(row, scale))),
    h("div", { class: "legend" }, services.map((s) => h("span", {}, h("i", { class: "dot", style: { background: serviceColour(s) } }), s.replace("kvmesh-", "")))));
}

function wrow(row, scale) {
  const place = h("div", {});
  const kinds = ["critical", "simulated"].filter((k) => row[k]).map((k) => (k === "critical" ? "crit" : "sim"));
  if (row.status === "ERROR") kinds.push("err");
  const left = 100 * row.offset_ms / scale, width = 100 * row.duration_ms / scale;
  const button = h("button", { class: "wrow", "aria-expanded": "false", "data-span": row.span_id, "data-critical": String(row.critical),
    "aria-label": `${row.name}, ${row.member}, ${ms(row.duration_ms)}${row.critical ? ", on the critical path" : ""}${row.simulated ? ", simulated" : ""}`,
    onclick: () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      place.replaceChildren(...(open ? [] : [detail(row)]));
    } },
    h("span", { class: "wname", style: { paddingLeft: `${row.depth * 14}px`, fontWeight: row.critical ? 600 : 400, color: row.status === "ERROR" ? "var(--bad)" : "" } },
      row.detached ? "? " : "", row.name),
    h("span", { class: "wmember" }, row.member),
    h("span", { class: "track" }, h("i", { class: kinds.join(" "), style: { left: `${Math.min(99.5, left)}%`, width: `${width}%`, backgroundColor: serviceColour(row.service) } }),
      row.events.length <= 8 ? row.events.map((e) => h("u", { style: { left: `${100 * e.at_ms / scale}%` } })) : null),
    h("span", { class: "wms" }, ms(row.duration_ms)));
  return [button, place];
}

function detail(row) {
  const pairs = (values) => h("dl", { class: "mono" }, Object.entries(values).flatMap(([key, value]) => [h("dt", {}, key),
    h("dd", {}, key === "kvmesh.route.candidates" ? "see the table below" : typeof value === "object" ? JSON.stringify(value) : String(value))]));
  return h("div", { class: "detail" }, row.status_message ? h("p", { class: "tag bad" }, row.status_message) : null,
    row.simulated ? h("p", {}, clockTag("simulated")) : null,
    h("h3", {}, "Attributes"), pairs({ start: `${ms(row.offset_ms)} after the trace's start`, ...row.attributes }),
    row.events.length ? [h("h3", {}, `Events (${row.events.length})`), h("dl", { class: "mono" }, row.events.flatMap((e) => [h("dt", {}, ms(e.at_ms)),
      h("dd", {}, `${e.name} `, Object.entries(e.attributes).map(([k, v]) => `${k}=${v}`).join(" "))]))] : null,
    h("h3", {}, "Resource"), pairs(row.resource));
}

const TERMS = [["queue_s", "Queue"], ["prefill_s", "Prefill"], ["transfer_s", "Transfer"], ["decode_s", "Decode load"]];
function routes(view) {
  if (!view.routes.length) return null;
  return h("section", { class: "card", id: "routes" }, h("h2", {}, "The router's choice"), view.routes.map((choice) => {
    const open = choice.candidates.filter((c) => !c.rejected).map((c) => c.total_s);
    const best = Math.min(...open), most = Math.max(...open, 1e-9);
    // Terms that the router adds later show without a change here.
    const known = new Set(["total_s", "prefill", "decode", "cached", "uncached", "rejected", ...TERMS.map(([k]) => k)]);
    const more = [...new Set(choice.candidates.flatMap(Object.keys))].filter((k) => !known.has(k));
    const columns = [...TERMS, ...more.map((k) => [k, k])];
    const cell = (label, ...children) => h("td", { class: "num", "data-label": label }, ...children);
    return h("div", { class: "scroll" }, h("p", { class: "dim", style: { margin: "0 0 6px" } }, choice.reason),
    h("table", {}, h("thead", {}, h("tr", {}, ["Workers", ...columns.map(([, t]) => t), "Cached", "To compute", "Predicted", ""].map((t, i) =>
      h("th", { class: i ? "num" : "", scope: "col" }, t)))),
    h("tbody", {}, choice.candidates.map((c) => h("tr", { class: !c.rejected && c.total_s === best ? "chosen" : "" },
      h("td", {}, c.prefill ? `${c.prefill} → ${c.decode}` : c.decode),
      columns.map(([k, t]) => cell(t, c.rejected ? "" : typeof c[k] === "number" && k.endsWith("_s") ? seconds(c[k]) : String(c[k] ?? ""))),
      cell("Cached", count(c.cached)), cell("To compute", count(c.uncached)),
      cell(c.rejected ? "Not possible" : "Predicted", c.rejected ? h("span", { class: "dim" }, c.rejected) : seconds(c.total_s)),
      h("td", { style: { width: "16%", minWidth: "90px" } }, c.rejected ? null : h("div", { class: "stack", style: { height: "8px", width: `${100 * c.total_s / most}%`, minWidth: "8px" } },
        TERMS.map(([k], i) => c[k] > 0 ? tipped(h("span", { style: { flex: `${c[k]} 1 0`, padding: 0, background: `var(--${["queue", "prefill", "kv", "hand"][i]})` } }), `${TERMS[i][1]}: ${seconds(c[k])}`) : null))))))));
  }));
}
