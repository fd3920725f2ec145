"""`kvmesh demo --keep` as its own process: what it names at the end really serves."""

import asyncio
import json
import re
import signal
import sys
import urllib.request
from typing import Any

ENDS_S = 30.0


def read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


async def test_the_demo_ends_with_urls_that_serve_until_it_is_told_to_stop() -> None:
    demo = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvmesh.cli.main", "demo", "--keep", "--tokens", "256",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert demo.stdout is not None
    try:
        said = (await demo.stdout.readuntil(b"still serving")).decode()
        assert "right, expected" in said and "where the first one's time went" in said
        found = dict[str, str]()
        while len(found) < 3:
            line = (await demo.stdout.readline()).decode()
            match = re.match(r"\s+(traces|edge|mesh)\s+(\S+)", line)
            found.update([match.groups()] if match else [])
        traces = await asyncio.to_thread(read, f"{found['traces']}api/traces")
        assert len(traces["traces"]) >= 2
        models = await asyncio.to_thread(read, f"{found['edge']}/models")
        assert [model["id"] for model in models["data"]] == ["mini"]
        demo.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(demo.wait(), ENDS_S) == 0
    finally:
        if demo.returncode is None:
            demo.kill()
            await demo.wait()
