"""A request checked and in the form that routing and workers need. Pure but for the tokenizer.

Everything that a caller may have got wrong is found here, before any worker hears of it.
"""

import secrets
from dataclasses import dataclass

from kvmesh.services.common.errors import ContextExceeded, InvalidRequest, NotFound, Unavailable
from kvmesh.services.common.sampling import SamplingSettings, check_sampling
from kvmesh.services.kvcache.keys import block_keys, root_key
from kvmesh.services.router.core import RouteQuery
from kvmesh.v1 import common_pb2, inference_pb2

MAX_REQUEST_ID_BYTES = 128
MAX_SALT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can run.

    request_id: the caller's, or one made here. wire_id: under which workers know it; one of our
    own, since a caller may use an id twice. sampling: with seed and max_tokens set.
    """

    request_id: str
    wire_id: str
    model: inference_pb2.ModelInfo
    prompt: list[int]
    root: bytes
    salt: str
    sampling: common_pb2.SamplingParams
    settings: SamplingSettings

    @property
    def max_tokens(self) -> int:
        return self.sampling.max_tokens

    def query(
        self, output: list[int], handover: bool, exclude: frozenset[str] = frozenset()
    ) -> RouteQuery:
        """Where to run it, with the tokens said so far as part of what has to be computed."""
        tokens = self.prompt + output if output else self.prompt
        return RouteQuery(
            request_id=self.request_id,
            prompt_tokens=len(tokens),
            keys=block_keys(self.root, tokens, self.model.format.block_size or 64),
            max_tokens=self.max_tokens - len(output),
            exclude=exclude,
            handover=handover,
        )


def check_request(
    request: inference_pb2.GenerateRequest, model: inference_pb2.ModelInfo | None
) -> inference_pb2.ModelInfo:
    """The mesh's model. Raises the MeshError that names what is wrong, apart from the prompt's ids.

    Raises Unavailable before the first worker has joined.
    """
    for name, value, limit in (
        ("request_id", request.request_id, MAX_REQUEST_ID_BYTES),
        ("cache_salt", request.cache_salt, MAX_SALT_BYTES),
    ):
        size = len(value.encode())
        if size > limit:
            raise InvalidRequest(f"{name} has {size} bytes, must have at most {limit}")
    _check_prompt(request)
    if model is None:
        raise Unavailable("no worker has joined the mesh yet")
    if request.model and request.model != model.name:
        raise NotFound(f"no model '{request.model}'; this mesh has: {model.name}")
    return model


def text_prompt(
    request: inference_pb2.GenerateRequest,
) -> str | inference_pb2.ChatPrompt | None:
    """What a tokenizer has to encode; None if the prompt is ids already."""
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text
    return request.chat if kind == "chat" else None


def prepare(
    request: inference_pb2.GenerateRequest,
    model: inference_pb2.ModelInfo,
    prompt: list[int],
    salt: str,
    max_context: int,
) -> Prepared:
    """salt: of the cache, the caller's own within its tenant.

    Raises InvalidRequest for ids outside the vocabulary, or a prompt that does not fit.
    """
    _check_ids(prompt, model, max_context)
    settings = check_sampling(request.sampling, model.vocab_size)
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    left = max_context - len(prompt)
    sampling.max_tokens = min(left, settings.max_tokens or left)
    if settings.seed is None:
        sampling.seed = secrets.randbits(63)
    made = secrets.token_hex(16)
    block = model.format
    return Prepared(
        request_id=request.request_id or made,
        wire_id=made,
        model=model,
        prompt=prompt,
        root=root_key(block.fingerprint, block.codec, block.block_size or 64, salt),
        salt=salt,
        sampling=sampling,
        settings=settings,
    )


def _check_prompt(request: inference_pb2.GenerateRequest) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("the request has no prompt; set one of text, chat, tokens")
    empty = {
        "text": not request.text,
        "chat": not request.chat.messages,
        "tokens": not request.tokens.ids,
    }
    if empty[kind]:
        raise InvalidRequest(f"the {kind} prompt is empty")


def _check_ids(prompt: list[int], model: inference_pb2.ModelInfo, max_context: int) -> None:
    if not prompt:
        raise InvalidRequest("the prompt is empty: it has 0 tokens")
    largest = max(prompt)
    if largest >= model.vocab_size:
        raise InvalidRequest(
            f"prompt token id {largest} is outside the vocabulary of {model.vocab_size}"
        )
    if len(prompt) >= max_context:
        raise ContextExceeded(
            f"the prompt has {len(prompt)} tokens, the context has {max_context}, "
            "and at least one must be left for the output"
        )
