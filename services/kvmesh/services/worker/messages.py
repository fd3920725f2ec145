"""Between kvmesh.v1 messages and what the worker's core works with."""

from dataclasses import dataclass

from kvmesh.backends.base import ModelSpec
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout
from kvmesh.services.common.addresses import is_address
from kvmesh.services.common.errors import InvalidRequest, MeshError, status_number
from kvmesh.services.common.sampling import check_sampling
from kvmesh.services.kvcache.keys import root_key
from kvmesh.services.worker.outcome import Load
from kvmesh.services.worker.sampler import Logprob
from kvmesh.services.worker.sequence import Finish, Sequence, Update, Work
from kvmesh.services.worker.timeline import SimulatedTrace, TransferTime
from kvmesh.v1 import common_pb2, inference_pb2, worker_pb2

MAX_REQUEST_ID_BYTES = 128
MAX_START_NS = 1 << 62  # of a simulated trace: the year 2116
MAX_TRANSFER_BASE_S = 3600.0
MAX_TRANSFER_BYTE_S = 1e-3


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a Submit does not say itself. now: seconds on the engine's clock."""

    ticket: int
    now: float
    trace: tuple[tuple[str, str], ...]


def block_format(layout: KvLayout) -> common_pb2.BlockFormat:
    return common_pb2.BlockFormat(
        fingerprint=layout.fingerprint,
        codec=layout.codec_label,
        block_size=BLOCK_SIZE,
        block_bytes=layout.block_bytes,
    )


def model_info(spec: ModelSpec, max_context: int) -> inference_pb2.ModelInfo:
    """max_context: tokens that this worker can hold for one request."""
    return inference_pb2.ModelInfo(
        name=spec.name,
        vocab_size=spec.vocab_size,
        max_context=max_context,
        format=block_format(spec.layout),
        eos_token_ids=spec.eos_token_ids,
    )


def to_work(submit: worker_pb2.Submit, spec: ModelSpec, receipt: Receipt) -> Work:
    """Raises InvalidRequest naming the field, its value and its limit."""
    size = len(submit.request_id.encode())
    if not 0 < size <= MAX_REQUEST_ID_BYTES:
        raise InvalidRequest(f"request_id has {size} bytes, must have 1..{MAX_REQUEST_ID_BYTES}")
    if not submit.token_ids:
        raise InvalidRequest("token_ids is empty, must hold at least one id")
    largest = max(submit.token_ids)
    if largest >= spec.vocab_size:
        raise InvalidRequest(f"token id {largest} is outside the vocabulary of {spec.vocab_size}")
    _check_addresses(submit)
    layout = spec.layout
    return Work(
        ticket=receipt.ticket,
        request_id=submit.request_id,
        token_ids=tuple(submit.token_ids),
        num_prompt=submit.num_prompt_tokens,
        settings=check_sampling(submit.sampling, spec.vocab_size),
        root=root_key(layout.fingerprint, layout.codec_label, BLOCK_SIZE, submit.cache_salt),
        eos_token_ids=spec.eos_token_ids,
        prefill_only=submit.prefill_only,
        deadline=receipt.now + submit.deadline_ms / 1000 if submit.deadline_ms else None,
        shards=tuple(submit.shard_addresses),
        tail_address=submit.tail_address,
        trace=receipt.trace,
        simulated=_simulated_trace(submit),
        source=_source(submit),
    )


def _simulated_trace(submit: worker_pb2.Submit) -> SimulatedTrace | None:
    if not submit.HasField("simulated"):
        return None
    start_ns = submit.simulated.start_ns
    if start_ns > MAX_START_NS:
        raise InvalidRequest(f"simulated.start_ns is {start_ns}, must be at most {MAX_START_NS}")
    return SimulatedTrace(pairs_of(submit.simulated.context), submit.simulated.start_ns)


def _source(submit: worker_pb2.Submit) -> TransferTime:
    source = submit.source
    limits = (
        ("base_s", source.base_s, MAX_TRANSFER_BASE_S),
        ("byte_s", source.byte_s, MAX_TRANSFER_BYTE_S),
    )
    for name, value, limit in limits:
        if not 0 <= value <= limit:  # nor not a number
            raise InvalidRequest(f"source.{name} is {value}, must be in [0, {limit:g}]")
    return TransferTime(source.base_s, source.byte_s)


def pairs_of(context: common_pb2.TraceContext) -> tuple[tuple[str, str], ...]:
    """As call metadata has them."""
    pairs = (("traceparent", context.traceparent), ("tracestate", context.tracestate))
    return tuple(pair for pair in pairs if pair[1])


def _check_addresses(submit: worker_pb2.Submit) -> None:
    given = (*submit.shard_addresses, *([submit.tail_address] if submit.tail_address else []))
    for address in given:
        if not is_address(address):
            raise InvalidRequest(f"address {address[:300]!r} must be host:port")


def token_update(update: Update) -> worker_pb2.TokenUpdate:
    """A hand-over's end is not told here: it waits until its blocks have been put."""
    sequence = update.sequence
    finish = update.finish if update.finish is not Finish.HANDOVER else None
    message = worker_pb2.TokenUpdate(
        request_id=sequence.work.request_id,
        token_ids=update.tokens,
        logprobs=[_logprob(item) for item in update.logprobs],
        finish_reason=common_pb2.FinishReason.ValueType(finish or 0),
        error=request_error(update.error) if update.error is not None else None,
        device=_device_seconds(sequence),
    )
    if update.first:
        times = sequence.timeline
        first_step = times.first_step if times.first_step is not None else times.received
        first_token = times.first_token if times.first_token is not None else first_step
        message.cached_tokens = sequence.cached_tokens
        message.queue_s = first_step - times.received
        message.prefill_s = first_token - first_step
    return message


def _device_seconds(sequence: Sequence) -> worker_pb2.DeviceSeconds:
    use, simulated = sequence.use, sequence.simulated
    return worker_pb2.DeviceSeconds(
        queue_s=use.queue_s,
        prefill_s=use.prefill_s,
        decode_s=use.decode_s,
        kv_s=use.kv_s,
        simulated_s=simulated.elapsed_s if simulated is not None else 0.0,
    )


def end_update(
    request_id: str, finish: Finish, error: MeshError | None = None
) -> worker_pb2.TokenUpdate:
    return worker_pb2.TokenUpdate(
        request_id=request_id,
        finish_reason=common_pb2.FinishReason.ValueType(finish),
        error=request_error(error) if error is not None else None,
    )


def request_error(error: MeshError) -> common_pb2.RequestError:
    return common_pb2.RequestError(
        code=status_number(error),
        message=str(error),
        retry_after_ms=round(error.retry_after_s * 1000),
    )


def load_report(load: Load, draining: bool) -> worker_pb2.LoadReport:
    counters, estimate = load.counters, load.estimate
    return worker_pb2.LoadReport(
        running=load.running,
        waiting=load.waiting,
        pending_prefill_tokens=load.pending_prefill_tokens,
        blocks_total=load.blocks_total,
        blocks_free=load.blocks_free,
        estimate=worker_pb2.Estimate(
            base_s=estimate.base_s,
            prefill_token_s=estimate.prefill_token_s,
            decode_token_s=estimate.decode_token_s,
            context_token_s=estimate.context_token_s,
            simulated=estimate.simulated,
        ),
        preemptions=counters.preemptions,
        checksum_failures=counters.checksum_failures,
        tokens_generated=counters.tokens_generated,
        tokens_prefilled=counters.tokens_prefilled,
        steps=counters.steps,
        draining=draining,
    )


def _logprob(item: Logprob) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(
        token_id=item.token_id,
        logprob=item.logprob,
        top_token_ids=[token for token, _ in item.top],
        top_logprobs=[value for _, value in item.top],
    )
