"""Calls the tokenizer."""

from collections.abc import Sequence

import grpc

from kvmesh.services.common.client import Deadlines, Link
from kvmesh.services.common.errors import from_rpc
from kvmesh.services.tokenizer.stream import DetokenizeStream, NewTokens
from kvmesh.v1 import inference_pb2, tokenizer_pb2_grpc
from kvmesh.v1 import tokenizer_pb2 as pb

__all__ = ["DetokenizeStream", "NewTokens", "TokenizerClient"]


class TokenizerClient:
    """Prompts and whole texts. Raises what the tokenizer raised, Unavailable or Expired."""

    def __init__(self, link: Link, deadlines: Deadlines | None = None) -> None:
        self._link = link
        self._timeout_s = (deadlines or Deadlines()).encode_s
        self._stub = tokenizer_pb2_grpc.TokenizerStub(link.channel)

    async def encode(
        self, prompt: str | inference_pb2.ChatPrompt, salt: str = ""
    ) -> pb.EncodeResponse:
        """Ids of a text as it is, or of messages through the chat template."""
        if isinstance(prompt, str):
            request = pb.EncodeRequest(text=prompt, cache_salt=salt)
        else:
            request = pb.EncodeRequest(chat=prompt, cache_salt=salt)
        try:
            return await self._stub.Encode(
                request, timeout=self._timeout_s, metadata=self._link.metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"tokenizer at {self._link.address}") from error

    async def decode(self, token_ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        """All ids at once."""
        request = pb.DecodeRequest(token_ids=token_ids, keep_special_tokens=keep_special_tokens)
        try:
            reply = await self._stub.Decode(
                request, timeout=self._timeout_s, metadata=self._link.metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"tokenizer at {self._link.address}") from error
        return reply.text
