"""Takes docs/traces-*.png, for `make shots`: of a mesh that it starts and sends some requests."""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
from meshes import prompts
from playwright.async_api import Browser, Page, async_playwright
from test_trace_page import CHROMIUM

from kvmesh.integration.launch import Mesh, running_mesh
from kvmesh.integration.launch_state import traces_path
from kvmesh.integration.trace_page import serve_page
from kvmesh.services.common.config import GatewayConfig, MeshConfig, RouterConfig
from kvmesh.services.traces.query import Filter
from kvmesh.services.traces.reader import SpanReader

VIEWS = ("list", "waterfall", "compare", "latency")
WHOLE = ("waterfall", "compare")  # the rest is as long as there are requests
PHONE = 720
REQUESTS = 24
READY_S = 120.0


async def shoot(folder: Path, width: int) -> None:
    """folder: gets traces-<view>-<theme>.png of each view, `width` pixels wide."""
    with tempfile.TemporaryDirectory(prefix="kvmesh-shots-") as name:
        run_dir = Path(name)
        config = MeshConfig(router=RouterConfig(port=0), gateway=GatewayConfig(port=0))
        async with running_mesh(config, run_dir) as mesh:
            await mesh.wait_ready(READY_S)
            await load(mesh)
        async with page_of(traces_path(run_dir)) as url, async_playwright() as driver:
            browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for theme in ("light", "dark"):
                await each_view(browser, url, run_dir, folder, (theme, width))
            await browser.close()


async def load(mesh: Mesh) -> None:
    """Hits and misses: each prompt comes twice, four requests at once."""
    texts = prompts(REQUESTS // 2)
    limit = asyncio.Semaphore(4)
    async with openai.AsyncOpenAI(base_url=f"{mesh.http_url}/v1", api_key="any") as client:

        async def one(prompt: list[int]) -> None:
            async with limit:
                stream: Any = await client.completions.create(
                    model=mesh.config.model.name, prompt=prompt, max_tokens=96, stream=True,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                async for _ in stream:
                    pass

        for _ in range(2):
            await asyncio.gather(*(one(prompt) for prompt in texts))


@asynccontextmanager
async def page_of(store: Path) -> AsyncIterator[str]:
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(serve_page(store, 0, listening.set_result, stop))
    try:
        yield await listening
    finally:
        stop.set()
        await task


async def each_view(
    browser: Browser, url: str, run_dir: Path, folder: Path, look: tuple[str, int]
) -> None:
    theme, width = look
    with SpanReader(traces_path(run_dir)) as reader:
        found = reader.newest(Filter(), REQUESTS)
    hit = next(t.trace_id for t in found if t.cached_tokens)
    miss = next(t.trace_id for t in found if not t.cached_tokens)
    places = {
        "waterfall": f"trace/{miss}",
        "compare": f"compare/{miss}/{hit}",
        "latency": "latency",
    }
    page: Page = await browser.new_page(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if theme == "dark" else "light",
    )
    for view in VIEWS:
        await page.goto(f"{url}#/{places.get(view, '')}")
        await page.reload()
        await page.wait_for_selector(".u-over" if view == "latency" else ".wrow, tr.go")
        await page.screenshot(
            path=folder / f"traces-{view}-{theme}.png", full_page=view in WHOLE or width < PHONE
        )
    await page.close()


if __name__ == "__main__":
    asyncio.run(shoot(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1280))
