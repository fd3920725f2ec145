"""The Python client against a server that fails as it is told to."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from kvmesh.client import (
    AsyncClient,
    Client,
    ConfigError,
    Expired,
    InvalidRequest,
    Options,
    Overloaded,
    Retry,
    Security,
    Unauthenticated,
    Unavailable,
    chat,
    load_credentials,
    text,
    tokens,
)
from kvmesh.client.retry import Attempts
from kvmesh.services.common.errors import MeshError
from kvmesh.services.common.server import BoundServer, Listener
from kvmesh.v1 import common_pb2, inference_pb2, inference_pb2_grpc

FAST = Retry(attempts=4, first_s=0.001)
WAIT_S = 30.0


class Scripted(inference_pb2_grpc.InferenceServicer):
    """Ends its first calls with `errors`, after `before` responses; then answers."""

    def __init__(self, errors: Sequence[MeshError] = (), before: int = 0) -> None:
        self.errors = list(errors)
        self.before = before
        self.calls = 0
        self.cancelled = threading.Event()
        self.block = False

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.calls += 1
        try:
            if self.errors:
                for _ in range(self.before):
                    yield inference_pb2.GenerateResponse(text="x")
                raise self.errors.pop(0)
            yield inference_pb2.GenerateResponse(text="a", token_ids=[1], request_id="r")
            if self.block:
                await asyncio.Event().wait()
            usage = inference_pb2.Usage(completion_tokens=2)
            end = common_pb2.FINISH_REASON_STOP
            yield inference_pb2.GenerateResponse(
                text="b", token_ids=[2], finish_reason=end, usage=usage
            )
        except (asyncio.CancelledError, GeneratorExit):
            # The second where the call ends while its last response is still being written: then
            # gRPC's own task is cancelled, and this generator closed.
            self.cancelled.set()
            raise

    async def Route(self, request: Any, context: Any) -> inference_pb2.RouteResponse:
        return inference_pb2.RouteResponse(prompt_tokens=len(request.request.tokens.ids))

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return inference_pb2.ListModelsResponse(models=[inference_pb2.ModelInfo(name="m")])


class Server:
    """A Scripted service in an event loop of its own, so that synchronous callers can block."""

    def __init__(self, servicer: Scripted, security: Security) -> None:
        self.servicer = servicer
        self._security = security
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.address: str = self._run(self._start())

    def close(self) -> None:
        self._run(self._bound.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    async def _start(self) -> str:
        listener = Listener("localhost", 0, ("kvmesh.v1.Inference",), mutual=False)
        self._bound = BoundServer(listener, self._security)
        inference_pb2_grpc.add_InferenceServicer_to_server(self.servicer, self._bound.server)
        return await self._bound.bind()


@pytest.fixture
def serving() -> Iterator[Any]:
    started: list[Server] = []

    def start(servicer: Scripted, security: Security | None = None) -> str:
        started.append(Server(servicer, security or Security()))
        return started[-1].address

    yield start
    for server in started:
        server.close()


def both(address: str, **options: Any) -> Iterator[Any]:
    """One answer from each client, as a callable that makes it."""

    def synchronous() -> Any:
        with Client(address, **options) as client:
            return client.generate(chat("hi"))

    async def asynchronous() -> Any:
        async with AsyncClient(address, **options) as client:
            return await client.generate(chat("hi"))

    yield synchronous
    yield lambda: asyncio.run(asynchronous())


def test_client_answers_add_up(serving):
    for ask in both(serving(Scripted())):
        answer = ask()
        assert (answer.text, answer.token_ids, answer.request_id) == ("ab", [1, 2], "r")
        assert answer.finish_reason == "stop"
        assert answer.usage.completion_tokens == 2


def test_client_tries_again_until_it_is_answered(serving):
    for number in range(2):
        errors = [Unavailable("drains"), Overloaded("full", 0.002), Unavailable("drains")]
        servicer = Scripted(errors)
        ask = list(both(serving(servicer), retry=FAST))[number]
        assert ask().text == "ab"
        assert servicer.calls == 4


def test_client_gives_up_after_its_attempts(serving):
    for number in range(2):
        servicer = Scripted([Unavailable(f"drains {i}") for i in range(9)])
        ask = list(both(serving(servicer), retry=FAST))[number]
        with pytest.raises(Unavailable, match="drains 3"):
            ask()
        assert servicer.calls == 4


def test_client_never_tries_again_after_the_first_token(serving):
    for number in range(2):
        servicer = Scripted([Unavailable("gone"), Unavailable("gone")], before=1)
        ask = list(both(serving(servicer), retry=FAST))[number]
        with pytest.raises(Unavailable, match="gone"):
            ask()
        assert servicer.calls == 1


def test_client_does_not_repeat_what_would_fail_again(serving):
    for number in range(2):
        servicer = Scripted([InvalidRequest("top_p is 2, at most 1")])
        ask = list(both(serving(servicer), retry=FAST))[number]
        with pytest.raises(InvalidRequest, match="top_p is 2"):
            ask()
        assert servicer.calls == 1


def test_client_deadline_ends_a_stream(serving):
    servicer = Scripted()
    servicer.block = True
    for ask in both(serving(servicer), timeout_s=0.2):
        with pytest.raises(Expired):
            ask()


def test_client_nobody_listens():
    for ask in both("localhost:1", retry=FAST):
        with pytest.raises(Unavailable):
            ask()


def test_client_closing_a_stream_cancels_the_request(serving):
    servicer = Scripted()
    servicer.block = True
    with Client(serving(servicer)) as client:
        stream = client.stream(chat("hi"))
        assert next(stream).text == "a"
        stream.close()
        assert servicer.cancelled.wait(WAIT_S)


async def test_client_closing_an_async_stream_cancels_the_request(serving):
    servicer = Scripted()
    servicer.block = True
    async with AsyncClient(serving(servicer)) as client:
        async with aclosing(client.stream(chat("hi"))) as stream:
            assert (await anext(stream)).text == "a"
        assert await asyncio.to_thread(servicer.cancelled.wait, WAIT_S)


async def test_client_route_and_models(serving):
    servicer = Scripted([Unavailable("starts")])
    address = serving(servicer)
    async with AsyncClient(address, retry=FAST) as client:
        assert [model.name for model in await client.models()] == ["m"]
        assert (await client.route(tokens([1, 2, 3]))).prompt_tokens == 3
    servicer.errors = [Unavailable("starts")]
    with Client(address, retry=FAST) as client:
        assert [model.name for model in client.models()] == ["m"]
        assert client.route(tokens([1, 2])).prompt_tokens == 2
    assert servicer.calls == 4


def test_client_is_shared_by_threads(serving):
    with Client(serving(Scripted())) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.generate(text("hi")).text, range(32)))
    assert answers == ["ab"] * 32


def test_client_tls_and_token_from_files(serving, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("KVMESH_TOKEN", raising=False)
    ca = trustme.CA()
    issued = ca.issue_cert("localhost")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "token").write_text("secret\n")
    own = Security(
        cert=issued.cert_chain_pems[0].bytes(),
        key=issued.private_key_pem.bytes(),
        ca=ca.cert_pem.bytes(),
        token="secret",
    )
    address = serving(Scripted(), own)
    known = load_credentials(ca=tmp_path / "ca.pem", token_file=tmp_path / "token")
    for ask in both(address, credentials=known):
        assert ask().text == "ab"
    for ask in both(address, credentials=load_credentials(ca=tmp_path / "ca.pem")):
        with pytest.raises(Unauthenticated):
            ask()
    with pytest.raises(ConfigError, match=r"none\.pem"):
        load_credentials(ca=tmp_path / "none.pem")


def test_client_pause_honours_what_the_server_asked_for():
    retry = Retry(attempts=3, first_s=1.0, max_s=3.0)
    assert retry.pause_s(1, Unavailable("x"), 0.0) == 0.5
    assert retry.pause_s(2, Unavailable("x"), 1.0) == 2.0
    assert retry.pause_s(2, Overloaded("x", 7.5), 1.0) == 7.5
    assert retry.pause_s(3, Unavailable("x"), 0.0) is None
    assert retry.pause_s(1, InvalidRequest("x"), 0.0) is None
    assert Retry(attempts=99, max_s=3.0).pause_s(50, Unavailable("x"), 1.0) == 3.0


def test_client_does_not_pause_past_its_deadline():
    error = Overloaded("full", 5.0)
    attempts = Attempts(Retry(), timeout_s=4.0, now=100.0)
    with pytest.raises(Overloaded, match="full"):
        attempts.pause_s(error, 100.0, 0.0)
    assert Attempts(Retry(), timeout_s=6.0, now=100.0).pause_s(error, 100.0, 0.0) == 5.0
    assert attempts.left_s(103.0) == 1.0
    assert attempts.left_s(200.0) == 0.001


def test_client_requests_from_plain_values():
    request = chat(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        model="m", max_tokens=3, temperature=0.5, stop=["x"], logit_bias={7: 1.5},
    )  # fmt: skip
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "s"), ("user", "u")]
    assert (request.model, request.sampling.max_tokens) == ("m", 3)
    assert dict(request.sampling.logit_bias) == {7: 1.5}
    assert not request.sampling.HasField("top_p")
    assert text("a").text == "a"
    assert chat([]).WhichOneof("prompt") == "chat"
    with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
        chat("a", max_token=3)  # type: ignore[call-arg]


def test_client_options_are_the_plain_fields_of_the_contract():
    """A plain field added to the contract must be settable, too."""
    both = (common_pb2.SamplingParams.DESCRIPTOR, inference_pb2.GenerateRequest.DESCRIPTOR)
    plain = {field.name for kind in both for field in kind.fields if field.message_type is None}
    assert set(Options.__annotations__) == (plain | {"logit_bias"}) - {"text"}


def test_client_synchronous_errors_are_calls():
    """from_rpc reads status and trailers of what the synchronous library raises."""
    with grpc.insecure_channel("localhost:1") as channel:
        call = channel.unary_unary("/a/b")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=1)
    assert isinstance(caught.value, grpc.Call)
