"""The tracing page in a real browser, by clicks. Needs Debian's `chromium`; skipped without it."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmesh.integration.launch_state import traces_path
from kvmesh.services.traces.store import Limits, SpanStore

sys.path.append(str(Path(__file__).parents[2] / "services" / "tests"))
from trace_samples import record, request, trace_id

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("page")
    writer = SpanStore(traces_path(run_dir), Limits(64 << 20, 1e12))
    price = {"kvmesh.cost.usd": 0.00012, "kvmesh.cost.queue_usd": 0.00001}
    writer.append(request("miss", attributes=price), {"dropped_full": 4})
    writer.append(request("hit", at=5_000, slow=0.4, cached=832), {})
    tenant = {"kvmesh.tenant": "acme"}
    bad = record("bad", "kv put", "run", (10_020, 10_030), member="kvcache-0", status="ERROR",
                 status_message="shard is full")  # fmt: skip
    writer.append([*request("bad", at=10_000, slow=9.0, attributes=tenant), bad], {})
    twin = [{"trace_id": trace_id("miss"), "span_id": "1" * 16, "attributes": {}}]
    writer.append(request("sim", at=11_000, slow=50.0, clock="simulated", links=twin), {})
    writer.close()
    return run_dir


@pytest.fixture(scope="module")
def url(store: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "kvmesh.cli.main", "trace", "ui"]
    page = subprocess.Popen(
        [*command, "--run-dir", str(store), "--port", str(port)], stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert page.poll() is None
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
    finally:
        page.terminate()
        page.wait(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, url):  # type: ignore[no-untyped-def]
    """A page that fails its test for an error in a script, or a request to any other host."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((url, "data:")) else wrong.append(r.url))
    page.goto(url)
    page.wait_for_selector("tr.go")
    yield page
    context.close()
    assert wrong == []


def ids(page) -> list[str]:  # type: ignore[no-untyped-def]
    return page.eval_on_selector_all("tr.go", "rows => rows.map(row => row.dataset.id)")


def expect_ids(page, *traces: str) -> None:  # type: ignore[no-untyped-def]
    wanted = [trace_id(t) for t in traces]
    for _ in range(400):
        if ids(page) == wanted:
            break
        page.wait_for_timeout(50)
    assert ids(page) == wanted


def test_trace_page_lists_newest_first_and_filters(page) -> None:  # type: ignore[no-untyped-def]
    assert ids(page) == [trace_id(t) for t in ("sim", "bad", "hit", "miss")]
    assert page.locator("#lost").inner_text() == "4 spans dropped"
    page.select_option("select[name=status]", "error")
    expect_ids(page, "bad")
    page.select_option("select[name=status]", "")
    page.select_option("select[name=tenant]", "acme")
    expect_ids(page, "bad")
    page.select_option("select[name=tenant]", "")
    page.fill("input[name=min_ttft_ms]", "100")
    expect_ids(page, "sim", "bad")
    page.select_option("select[name=clock]", "measured")
    expect_ids(page, "bad")
    page.reload()  # the address holds the filters
    expect_ids(page, "bad")
    page.fill("input[name=min_ttft_ms]", "")
    page.select_option("select[name=clock]", "")
    page.fill("#search", "shard is full")
    expect_ids(page, "bad")
    page.fill("#search", "")
    page.fill("input[name=min_ttft_ms]", "100")  # at once after the other: neither is lost
    page.fill("input[name=min_duration_ms]", "1")
    page.wait_for_url(lambda url: "min_ttft_ms=100" in url and "min_duration_ms=1" in url)
    assert "q=" not in page.url


def test_trace_page_shows_no_late_answer_to_earlier_filters(page) -> None:  # type: ignore[no-untyped-def]
    held = []
    page.route(
        re.compile(r"api/traces\?"),
        lambda route: route.continue_() if "=error" in route.request.url else held.append(route),
    )
    for _ in range(400):  # until the page asks again by itself
        if held:
            break
        page.wait_for_timeout(50)
    page.select_option("select[name=status]", "error")
    expect_ids(page, "bad")
    page.evaluate(
        "() => { window.changes = 0; new MutationObserver(() => { window.changes += 1; })"
        ".observe(document.querySelector('tbody'), { childList: true }); }"
    )
    with page.expect_request(lambda request: "=error" in request.url):  # the next look
        held[0].continue_()
    assert page.evaluate("window.changes") == 0


def test_trace_page_is_live(page, store: Path) -> None:  # type: ignore[no-untyped-def]
    page.fill("#search", "newcomer")
    expect_ids(page)
    writer = SpanStore(traces_path(store), Limits(64 << 20, 1e12))
    old = request("new", at=-60_000, attributes={"note": "newcomer"})
    writer.append(old, {})
    writer.close()
    expect_ids(page, "new")


def test_trace_page_shows_one_trace(page) -> None:  # type: ignore[no-untyped-def]
    page.click(f"tr[data-id='{trace_id('miss')}']")
    page.wait_for_selector("#ttft")
    pieces = [p.get_attribute("data-piece") for p in page.locator("#ttft [data-piece]").all()]
    assert pieces == ["queue", "tokenize", "route", "KV fetch", "prefill", "first step", "other"]
    assert page.locator("#decode .stall").count() == 1
    page.hover("#decode .stall")
    assert "stalled" in page.locator("#tip").inner_text()
    assert page.locator("#routes tbody tr").count() == 2
    assert "worker-0 → worker-1" in page.locator("#routes tr.chosen").inner_text()
    facts = page.locator(".facts").inner_text()
    assert "3.9 KiB raw (4.0x)" in facts
    assert "120 µ$" in facts
    row = page.locator(".wrow", has_text="kv fetch")
    assert row.get_attribute("data-critical") == "false"
    row.click()
    assert "kvmesh.kv.raw_bytes" in page.locator(".detail").inner_text()
    page.locator(".wrow", has_text="decode").click()
    assert "Events (5)" in page.locator(".detail").last.inner_text()


def test_trace_page_exports(page) -> None:  # type: ignore[no-untyped-def]
    page.click(f"tr[data-id='{trace_id('miss')}'] a")
    found = {}
    for kind in ("chrome", "otlp"):
        with page.expect_download() as download:
            page.click(f"[data-export={kind}]")
        found[kind] = json.loads(Path(download.value.path()).read_text())
    assert len([e for e in found["chrome"]["traceEvents"] if e["ph"] == "X"]) == 8
    assert "resourceSpans" in found["otlp"]


def test_trace_page_compares_and_marks_simulated(page) -> None:  # type: ignore[no-untyped-def]
    for name in ("hit", "miss"):
        page.check(f"tr[data-id='{trace_id(name)}'] input")
    page.click("#compare")
    page.wait_for_selector(".two section")
    text = page.locator(".two").inner_text()
    assert "cache hit, 92 %" in text
    assert "cache miss" in text
    assert page.locator(".tag.sim").count() == 0
    page.click(f".two a[href='#/trace/{trace_id('miss')}']")
    page.wait_for_selector(f"[data-linked='{trace_id('sim')}']")
    page.click("[data-linked] a >> text=chat mini")  # to its simulated twin
    page.wait_for_selector("#ttft .tag.sim")
    assert page.locator(".track i.sim").count() == 8
    page.click("text=Compare with linked")
    page.wait_for_selector(".two section")
    assert "do not add them up" in page.locator(".note").inner_text()


def test_trace_page_latency_opens_an_outlier(page) -> None:  # type: ignore[no-untyped-def]
    page.click("a[data-view=latency]")
    page.wait_for_selector("[data-clock=measured] .u-over")
    # Measured and simulated each have a chart, and percentiles of their own.
    measured = page.locator("[data-clock=measured]").inner_text()
    assert "p99 450 ms" in measured
    assert "p50 2.50 s" in page.locator("[data-clock=simulated]").inner_text()
    box = page.locator("[data-clock=measured] .u-over").bounding_box()
    target = page.evaluate("""() => 1 - 450 / (450 * 1.08)""")
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] * target)
    page.wait_for_selector("#ttft")
    assert trace_id("bad") in page.url


def test_trace_page_by_keyboard_alone(page) -> None:  # type: ignore[no-untyped-def]
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    page.wait_for_selector(".wrow")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector(".detail")
    page.keyboard.press("Escape")
    page.wait_for_selector("tr.go")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"


@pytest.mark.parametrize("where", ["#/", "#/latency", "trace", "compare"])
def test_trace_page_fits_a_phone(page, where: str) -> None:  # type: ignore[no-untyped-def]
    miss, hit = trace_id("miss"), trace_id("hit")
    address = {"trace": f"#/trace/{miss}", "compare": f"#/compare/{miss}/{hit}"}.get(where, where)
    page.set_viewport_size({"width": 400, "height": 800})
    page.evaluate(f"location.hash = '{address}'")
    page.wait_for_selector(".card")
    page.click("#theme")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    whole = "nodes => nodes.every(node => node.scrollWidth <= node.clientWidth)"
    assert page.eval_on_selector_all(".scroll, .wname, #routes td", whole)


def test_trace_page_names_times_prices_and_services(page) -> None:  # type: ignore[no-untyped-def]
    call = "async ([name, ...given]) => (await import('./dom.js'))[name](...given)"
    colours = [page.evaluate(call, ["serviceColour", f"kvmesh-{name}"]) for name in
               ("gateway", "router", "worker", "unknown")]  # fmt: skip
    assert colours == [f"var(--{name})" for name in ("gateway", "router", "worker", "other")]
    prices = [page.evaluate(call, ["usd", value]) for value in (0, 1.2e-7, 0.00012, 0.5, 1234.5)]
    assert prices == ["$0.00", "0.120 µ$", "120 µ$", "$0.500", "$1,230"]
    for step, shape in ((3600, r"\d\d:\d\d"), (30, r"\d\d:\d\d:\d\d"), (0.5, r"[\d:]{8}\.\d")):
        first, second = page.evaluate(
            call, ["axisTimes", [1e9 + 61_200, 1e9 + 61_200 + step], step]
        )
        assert re.fullmatch(shape + r"\n\d+ \w+", first) and re.fullmatch(shape, second)
