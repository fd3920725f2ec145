"""What every request of a router works with, and the first step that all of them take."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvmesh.services.common.api_keys import Tenant
from kvmesh.services.common.callers import Callers
from kvmesh.services.common.config import RouterConfig
from kvmesh.services.common.errors import Expired
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.services.router.admission import Admission
from kvmesh.services.router.core import RouterCore
from kvmesh.services.router.fleet import Fleet
from kvmesh.services.router.limits import TenantLimits
from kvmesh.services.router.prepare import Prepared, check_request, prepare, text_prompt
from kvmesh.services.router.request_metrics import RequestMetrics
from kvmesh.v1 import inference_pb2


@dataclass(slots=True)
class RouterParts:
    """What every request works with. clock: monotonic seconds."""

    config: RouterConfig
    core: RouterCore
    admission: Admission
    fleet: Fleet
    telemetry: Telemetry
    metrics: RequestMetrics
    callers: Callers = field(default_factory=Callers)
    limits: TenantLimits = field(default_factory=TenantLimits)
    clock: Callable[[], float] = time.monotonic
    draining: bool = False
    migrations: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # no request is left, in a drain


async def prepare_request(
    parts: RouterParts,
    request: inference_pb2.GenerateRequest,
    tenant: Tenant | None,
    timeout_s: float,
) -> Prepared:
    """Raises the MeshError that the caller is to see."""
    model = check_request(request, parts.fleet.membership.model)
    salt = request.cache_salt if tenant is None else tenant.salt(request.cache_salt)
    text = text_prompt(request)
    if text is None:
        prompt = list(request.tokens.ids)
    else:
        try:
            async with asyncio.timeout(timeout_s):
                prompt = await parts.fleet.tokenizers.encode(text, salt)
        except TimeoutError as error:
            raise Expired(f"no token ids of the prompt within {timeout_s:.3f} s") from error
    return prepare(request, model, prompt, salt, parts.fleet.max_context())
