// Latency over time, one chart for each clock; a click opens the request nearest to it.
import { api, axisTimes, clockTag, h, ms } from "./dom.js";
import { filterForm } from "./list.js";

const METRICS = [["ttft", "TTFT"], ["tpot", "TPOT"], ["duration", "Total"]];

export function latencyView(main, query, changed) {
  const charts = h("div");
  const seg = h("div", { class: "seg", role: "group", "aria-label": "What to plot" }, METRICS.map(([name, label]) =>
    h("button", { "aria-pressed": String((query.get("metric") || "ttft") === name), "data-metric": name,
      onclick: (e) => { query.set("metric", name); for (const b of seg.children) b.setAttribute("aria-pressed", String(b === e.target)); changed(); } }, label)));
  const form = filterForm(query, changed);
  main.replaceChildren(h("div", { class: "bar" }, h("h1", { class: "grow" }, "Latency over time"), seg), form, charts);
  let last = "", asked = 0;
  return async () => {
    const mine = ++asked;
    const [data, list] = await Promise.all([api(`api/latency?${query}`), api("api/traces?limit=1")]);
    if (mine !== asked) return;
    for (const [name, values] of Object.entries(list.facets)) {
      const box = form.querySelector(`select[name=${name}]`);
      if (box && box.options.length !== values.length + 1) box.replaceChildren(h("option", { value: "" }, "any"),
        ...values.map((v) => h("option", { value: v, selected: query.get(name) === v }, v)));
    }
    const said = JSON.stringify(data) + document.documentElement.dataset.theme + innerWidth;
    if (said === last) return;
    last = said;
    const shown = data.clocks.filter((c) => c.points.length);
    charts.replaceChildren();
    if (!shown.length) charts.append(h("div", { class: "card empty" }, "No request fits."));
    for (const one of shown) draw(charts, one);
  };
}

function draw(charts, one) {
  const place = h("div", { class: "chart" });
  const slow = [...one.points].sort((a, b) => b[1] - a[1]).slice(0, 5);
  charts.append(h("section", { class: "card", "data-clock": one.clock }, h("h2", {}, `${one.points.length} requests `,
    h("small", {}, Object.entries(one.all).map(([name, value]) => `${name} ${ms(value)}`).join("   ")), " ", clockTag(one.clock)), place,
    h("div", { class: "legend" }, [["p50", "--worker"], ["p95", "--kvcache"], ["p99", "--bad"]].map(([n, c]) =>
      h("span", {}, h("i", { class: "dot", style: { background: `var(${c})` } }), n)), h("span", {}, "a dot is a request; click one to open it")),
    h("p", { class: "dim", style: { margin: "10px 0 0" } }, "Slowest: ", slow.map(([, value, id]) => [h("a", { href: `#/trace/${id}`, "data-slow": id }, ms(value)), "  "]))));
  const css = getComputedStyle(document.documentElement), colour = (name) => css.getPropertyValue(name).trim();
  const bins = one.bins;
  const times = [...new Set([...one.points.map((p) => p[0]), ...bins.map((b) => b[0])])].sort((a, b) => a - b);
  const at = new Map(times.map((t, i) => [t, i]));
  const series = [0, 1, 2, 3].map(() => new Array(times.length).fill(null));
  for (const [t, value] of one.points) series[0][at.get(t)] = value;
  for (const [t, ...values] of bins) values.forEach((v, i) => { series[i + 1][at.get(t)] = v; });
  const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  const line = (label, name) => ({ label, stroke: colour(name), width: 2, spanGaps: true, points: { show: bins.length < 3, size: 5 } });
  const dots = { label: "request", stroke: colour("--accent"), paths: () => null,
    points: { show: true, size: 6, fill: colour("--accent-soft"), stroke: colour("--accent") } };
  const plot = new uPlot({ width: Math.max(260, place.clientWidth), height: 300, series: [{}, dots, line("p50", "--worker"), line("p95", "--kvcache"), line("p99", "--bad")],
    scales: { y: { range: (_, low, high) => [0, (high || 1) * 1.08] } },
    axes: [{ ...axis, values: (_, ticks, index, space, step) => axisTimes(ticks, step) }, { ...axis, size: 64, values: (_, ticks) => ticks.map((t) => (t ? ms(t) : "0")) }], cursor: { drag: { x: false, y: false } } }, [times, ...series], place);
  plot.over.addEventListener("click", (event) => {
    const near = one.points.map(([t, value, id]) => [Math.hypot(plot.valToPos(t, "x") - event.offsetX, plot.valToPos(value, "y") - event.offsetY), id])
      .sort((a, b) => a[0] - b[0])[0];
    if (near[0] < 40) location.hash = `#/trace/${near[1]}`;
  });
}
