"""How many seconds a request would take on a worker, or on a pair of workers. Pure.

Built from each worker's own step estimate and load, so a simulated worker is priced by simulated
time and a measured one by measured time.
"""

import math
from dataclasses import dataclass

from kvmesh.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """Seconds of a step, as kvmesh.v1.Estimate; the defaults stand in until a worker reports."""

    base_s: float = 0.002
    prefill_token_s: float = 1e-4
    decode_token_s: float = 5e-4
    context_token_s: float = 1e-8


@dataclass(slots=True)
class CostModel:
    """What no worker reports. block_size and block_bytes are set when the first worker joins.

    step_tokens: prompt tokens of one step. transfer_bytes_s, transfer_base_s: one fetch or put of
    blocks takes base + bytes / rate seconds. expected_output: tokens that a request is taken to
    generate, if it may generate more. block_bytes: size of one sealed block.
    """

    step_tokens: int = 256
    transfer_bytes_s: float = 1e9
    transfer_base_s: float = 0.002
    expected_output: int = 128
    block_size: int = 64
    block_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One worker as a decision sees it.

    backlog_tokens: prompt tokens that wait or run there, sent ones that it has not yet reported
    included. running: requests there, likewise. max_prompt: most prompt tokens that fit.
    refused: why it takes nothing now; empty if it does.
    """

    member_id: str
    role: str
    estimate: StepEstimate
    running: int = 0
    backlog_tokens: int = 0
    max_prompt: int = 1 << 30
    refused: str = ""

    def step_s(self) -> float:
        """Seconds of a step that decodes what runs there, before prompt tokens."""
        return self.estimate.base_s + self.estimate.decode_token_s * self.running


@dataclass(slots=True)
class Prompt:
    """A prompt on one worker: its tokens, those cached there, and those on shards after them."""

    tokens: int
    local: int = 0
    remote: int = 0

    @property
    def uncached(self) -> int:
        return self.tokens - self.local - self.remote


@dataclass(slots=True)
class Candidate:
    """One way to run a request; the fields of kvmesh.v1.Candidate, seconds predicted.

    The seconds of a pair that is rejected for its prompt are not worked out.
    """

    prefill_worker: str  # empty: the decode worker does both
    decode_worker: str
    prompt: Prompt
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    running: int = 0
    rejected: str = ""
    chosen: bool = False

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.transfer_s + self.decode_s

    def to_proto(self) -> inference_pb2.Candidate:
        return inference_pb2.Candidate(
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            total_s=self.total_s,
            queue_s=self.queue_s,
            prefill_s=self.prefill_s,
            transfer_s=self.transfer_s,
            decode_s=self.decode_s,
            local_cached_tokens=self.prompt.local,
            remote_cached_tokens=self.prompt.remote,
            uncached_tokens=self.prompt.uncached,
            chosen=self.chosen,
            rejected=self.rejected,
        )


def queue_seconds(model: CostModel, load: WorkerLoad) -> float:
    """Until the prompts that are there already have been computed."""
    estimate = load.estimate
    steps = math.ceil(load.backlog_tokens / model.step_tokens)
    return steps * load.step_s() + estimate.prefill_token_s * load.backlog_tokens


def prefill_seconds(model: CostModel, load: WorkerLoad, prompt: Prompt) -> float:
    """To compute the uncached tokens; each attends to all tokens up to itself."""
    estimate = load.estimate
    count = max(1, prompt.uncached)
    steps = math.ceil(count / model.step_tokens)
    before = prompt.tokens - count
    attended = count * before + count * (count + 1) // 2
    return (
        steps * load.step_s()
        + estimate.prefill_token_s * count
        + estimate.context_token_s * attended
    )


def transfer_seconds(model: CostModel, tokens: int) -> float:
    """To move the sealed blocks of so many tokens once."""
    if tokens <= 0:
        return 0.0
    blocks = math.ceil(tokens / model.block_size)
    return model.transfer_base_s + blocks * model.block_bytes / model.transfer_bytes_s


def decode_seconds(load: WorkerLoad, prompt_tokens: int, output_tokens: int) -> float:
    """To generate the output, one step per token, beside what runs there."""
    estimate = load.estimate
    context = prompt_tokens + output_tokens / 2
    step_s = (
        estimate.base_s
        + estimate.decode_token_s * (load.running + 1)
        + estimate.context_token_s * context
    )
    return output_tokens * step_s


def single(model: CostModel, load: WorkerLoad, prompt: Prompt, output: int) -> Candidate:
    """One worker does prefill and decode."""
    return Candidate(
        "",
        load.member_id,
        prompt,
        queue_s=queue_seconds(model, load),
        prefill_s=prefill_seconds(model, load, prompt),
        transfer_s=transfer_seconds(model, prompt.remote),
        decode_s=decode_seconds(load, prompt.tokens, output),
        running=load.running,
        rejected=load.refused,
    )


@dataclass(slots=True)
class Place:
    """A prompt on a worker."""

    load: WorkerLoad
    prompt: Prompt


def prompt_seconds(model: CostModel, place: Place) -> float:
    """Until a worker has computed the prompt, whoever goes on from there."""
    return (
        queue_seconds(model, place.load)
        + prefill_seconds(model, place.load, place.prompt)
        + transfer_seconds(model, place.prompt.remote)
    )


def output_seconds(model: CostModel, place: Place, output: int) -> float:
    """What a worker would take to go on from a prompt that was computed elsewhere."""
    prompt = place.prompt
    return (
        queue_seconds(model, place.load)
        + decode_seconds(place.load, prompt.tokens, output)
        + transfer_seconds(model, prompt.tokens - prompt.local)
    )


def handover(model: CostModel, prefill: Place, decode: Place, output: int) -> Candidate:
    """`prefill` computes the prompt and puts its blocks; `decode` fetches them and goes on."""
    queue_s = queue_seconds(model, prefill.load)
    prefill_s = prefill_seconds(model, prefill.load, prefill.prompt)
    # The decode worker's own backlog runs down while the prompt is computed elsewhere.
    behind_s = queue_seconds(model, decode.load) - queue_s - prefill_s
    new = prefill.prompt.uncached // model.block_size * model.block_size
    missing = decode.prompt.tokens - decode.prompt.local
    sealed = missing // model.block_size * model.block_size
    transfer_s = (
        transfer_seconds(model, prefill.prompt.remote)
        + transfer_seconds(model, new)
        + transfer_seconds(model, sealed)
        + model.transfer_base_s  # the unfinished block
    )
    return Candidate(
        prefill.load.member_id,
        decode.load.member_id,
        prefill.prompt,
        queue_s=queue_s + max(0.0, behind_s),
        prefill_s=prefill_s,
        transfer_s=transfer_s,
        decode_s=decode_seconds(decode.load, decode.prompt.tokens, output),
        running=prefill.load.running + decode.load.running,
        rejected=prefill.load.refused or decode.load.refused,
    )
