"""Whether a worker really works: it is asked for one token before anyone hears that it serves."""

import asyncio

from kvmesh.services.common.errors import MeshError
from kvmesh.services.worker.hub import Hub
from kvmesh.services.worker.outbox import Outbox
from kvmesh.services.worker.session import Session
from kvmesh.v1 import worker_pb2

PROBE_ID = "probe"
PROBE_S = 120.0  # a first step may compile kernels


async def probe(hub: Hub) -> None:
    """Really generates one token. Raises the MeshError that prevented it."""
    session = Session(Outbox(incarnation=0, held=[]))
    bos = hub.spec.bos_token_id
    submit = worker_pb2.Submit(
        request_id=PROBE_ID, token_ids=[0 if bos is None else bos], num_prompt_tokens=1
    )
    submit.sampling.max_tokens = 1
    hub.submit(session, submit)
    tokens = 0
    async with asyncio.timeout(PROBE_S):
        while True:
            message = await session.outbox.next()
            for update in message.updates if message is not None else ():
                tokens += len(update.token_ids)
                if update.HasField("error"):
                    raise MeshError(f"the probe token failed: {update.error.message}")
                if update.finish_reason and tokens:
                    return
