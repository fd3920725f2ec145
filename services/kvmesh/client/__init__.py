"""The mesh's Python client, synchronous and asynchronous.

>>> from kvmesh.client import Client, chat
>>> with Client("127.0.0.1:50051") as client:
...     for piece in client.stream(chat("Hello", max_tokens=32)):
...         print(piece.text, end="", flush=True)

Every call ends: with its result, or with the MeshError that the mesh answered with. What can be
tried again is, with back-off, as long as no token has been given.
"""

from kvmesh.client.aio import AsyncClient
from kvmesh.client.answer import Answer
from kvmesh.client.credentials import load_credentials
from kvmesh.client.requests import Message, Options, chat, text, tokens
from kvmesh.client.retry import Retry
from kvmesh.client.sync import Client
from kvmesh.services.common.errors import (
    ConfigError,
    Corrupt,
    Expired,
    Incompatible,
    InvalidRequest,
    MeshError,
    NotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from kvmesh.services.common.security import Security

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "ConfigError",
    "Corrupt",
    "Expired",
    "Incompatible",
    "InvalidRequest",
    "MeshError",
    "Message",
    "NotFound",
    "Options",
    "Overloaded",
    "Retry",
    "Security",
    "Unauthenticated",
    "Unavailable",
    "chat",
    "load_credentials",
    "text",
    "tokens",
]
