"""`kvmesh kv`: the shards of the KV cache."""

from typing import TYPE_CHECKING

import typer

from kvmesh.cli.connect import open_client, resolve
from kvmesh.cli.errors import CommandFailed
from kvmesh.cli.options import Json, Target, command
from kvmesh.cli.render import plain, print_json, print_table, size

if TYPE_CHECKING:
    from kvmesh.v1 import kvcache_pb2

app = typer.Typer(no_args_is_help=True, help="Look into the shards of the KV cache.")


@command
async def stats(target: Target, json: Json = False) -> None:
    """Show what each shard holds and how often it was asked."""
    from kvmesh.services.common.client import Deadlines, Links
    from kvmesh.services.kvcache.client import KvCacheClient

    async with open_client(target) as client:
        members = (await client.status()).members
    shards = [member.address for member in members if member.kind == "kvcache"]
    if not shards:
        raise CommandFailed("the mesh has no kvcache shards; set kvcache.shards in mesh.toml")
    links = Links(resolve(target)[1])
    cache = KvCacheClient(links, Deadlines())
    try:
        replies = [await cache.stats(address) for address in shards]
    finally:
        await cache.close()
        await links.close()
    if json:
        print_json([{"address": a, **plain(r)} for a, r in zip(shards, replies, strict=True)])
        return
    columns: tuple[str, ...] = (
        "shard",
        "address",
        ">blocks",
        ">bytes",
        ">budget",
        ">hits",
        ">misses",
    )
    columns += (">puts", ">evictions", ">corrupt", ">leases")
    rows = (_row(address, reply) for address, reply in zip(shards, replies, strict=True))
    print_table("", columns, rows)


def _row(address: str, reply: "kvcache_pb2.KvStatsResponse") -> tuple[object, ...]:
    return (
        reply.member_id,
        address,
        reply.blocks,
        size(reply.bytes_used),
        size(reply.bytes_budget),
        reply.hits,
        reply.misses,
        reply.puts,
        reply.evictions,
        reply.checksum_failures,
        f"{reply.leases} on {reply.leased_blocks} blocks",
    )


app.command()(stats)
