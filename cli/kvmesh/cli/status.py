"""`kvmesh status` and `kvmesh models`: what the mesh is made of, live from the router."""

from typing import TYPE_CHECKING

from kvmesh.cli.connect import metrics_endpoints, open_client
from kvmesh.cli.options import Json, Target, command
from kvmesh.cli.render import console, plain, print_json, print_table, size

if TYPE_CHECKING:
    from kvmesh.v1 import inference_pb2


@command
async def status(target: Target, json: Json = False) -> None:
    """Show the members with their leases, requests and blocks."""
    async with open_client(target) as client:
        reply = await client.status()
    metrics = metrics_endpoints(target)
    if json:
        shown = plain(reply)
        for member in shown["members"]:
            member["metrics"] = metrics.get(member["member_id"], "")
        print_json(shown)
        return
    columns: tuple[str, ...] = ("member", "kind", "role", "state", "address", "device", ">lease")
    columns += (">running", ">waiting", ">blocks free", ">indexed", "metrics")
    print_table("", columns, [(*_row(m), metrics.get(m.member_id, "")) for m in reply.members])
    console().print(
        f"\nup {reply.uptime_s:.0f} s, {reply.requests_active} requests run, "
        f"{reply.requests_total} in all, {reply.migrations_total} migrations, "
        f"{reply.rejected_total} rejected, index {size(reply.index_bytes)}"
    )


def _row(member: "inference_pb2.MemberStatus") -> tuple[object, ...]:
    worker = member.kind == "worker"
    return (
        member.member_id,
        member.kind,
        member.role,
        member.state,
        " ".join((member.address, *member.other_addresses)),
        member.device + (" (simulated)" if member.simulated else ""),
        f"{member.lease_left_s:.1f} s" if member.lease_left_s else "",
        member.running if worker else "",
        member.waiting if worker else "",
        f"{member.blocks_free}/{member.blocks_total}" if member.blocks_total else "",
        member.indexed_blocks or "",
    )


@command
async def models(target: Target, json: Json = False) -> None:
    """List the models that the mesh serves."""
    async with open_client(target) as client:
        found = await client.models()
    if json:
        print_json({"models": [plain(model) for model in found]})
        return
    print_table(
        "",
        ("model", ">context", ">vocabulary", "codec", ">block", ">block size", "fingerprint"),
        [
            (
                model.name,
                f"{model.max_context} tokens",
                model.vocab_size,
                model.format.codec,
                f"{model.format.block_size} tokens",
                size(model.format.block_bytes),
                model.format.fingerprint.hex(),
            )
            for model in found
        ],
    )
