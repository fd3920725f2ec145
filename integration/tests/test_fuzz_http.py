"""Mutated requests against the edge; the documented command sends many more to a whole mesh."""

import asyncio
import random

from gateway_fakes import WAIT_S, FakeMesh, exchange, served

from kvmesh.integration.fuzz_http import fuzz, mutated

HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


async def test_mutated_requests_are_answered_and_nothing_stays() -> None:
    seed = random.randrange(1 << 32)
    mesh = FakeMesh()
    async with served(mesh) as (host, port):
        tally = await fuzz(f"http://{host}:{port}", 250, seed)
        assert (await exchange((host, port), HEALTH))[0] == 200
        async with asyncio.timeout(WAIT_S):
            while mesh.open:
                await asyncio.sleep(0)
    assert not tally.unexpected, (seed, tally.unexpected[:3])
    assert tally.statuses[200] and tally.statuses[400], seed


def test_mutations_depend_on_their_seed_alone() -> None:
    made = [mutated(3, number) for number in range(2000)]
    assert made == [mutated(3, number) for number in range(2000)]  # whatever was made in between
    assert mutated(3, 7) != mutated(4, 7)
