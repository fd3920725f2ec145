"""The tracing page and what it reads, as one ASGI application. Reads the store, writes nothing."""

import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from kvmesh.services.traces.export import chrome_json, otlp_json
from kvmesh.services.traces.latency import METRICS, latency
from kvmesh.services.traces.query import MAX_LIMIT, Filter
from kvmesh.services.traces.reader import SpanReader
from kvmesh.services.traces.view import trace_view

PAGE = Path(__file__).parent / "page"
DEFAULT_LIMIT = 200
# Nothing from elsewhere, and no page of another site may show this one inside itself.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
EXPORTS = {"chrome": chrome_json, "otlp": otlp_json}

Read = Callable[[SpanReader, Request], Any]


class BadQuery(ValueError):
    """A parameter that cannot be read; the message names it."""


def trace_app(store: Path) -> Starlette:
    """The application over one store file, which may come into being later."""
    routes = [
        Route("/api/traces", _answer(store, _list)),
        Route("/api/traces/{trace_id}", _answer(store, _show)),
        Route("/api/traces/{trace_id}/export", _answer(store, _export)),
        Route("/api/latency", _answer(store, _latency)),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    # A name that another site points at this address gets no answer.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    app = Starlette(routes=routes, middleware=[hosts])
    return _with_headers(app)


def _with_headers(app: Starlette) -> Starlette:
    from starlette.middleware.base import BaseHTTPMiddleware

    async def add(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    app.add_middleware(BaseHTTPMiddleware, dispatch=add)
    return app


def _answer(store: Path, read: Read) -> Callable[[Request], Awaitable[Response]]:
    """`read` in a thread with a reader of its own; errors as {"error": ...}."""

    def run(request: Request) -> Any:
        with SpanReader(store) as reader:
            return read(reader, request)

    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(run, request))
        except LookupError as error:
            return JSONResponse({"error": str(error.args[0])}, 404)
        except BadQuery as error:
            return JSONResponse({"error": str(error)}, 400)
        except FileNotFoundError:
            return JSONResponse({"error": f"no traces yet: {store} does not exist"}, 503)
        except sqlite3.Error as error:
            return JSONResponse({"error": f"{store} cannot be read: {error}"}, 503)

    return endpoint


def _list(reader: SpanReader, request: Request) -> dict[str, Any]:
    limit = _number(request, "limit")
    traces = reader.newest(_filter(request), int(limit or DEFAULT_LIMIT))
    return {
        "traces": [asdict(trace) for trace in traces],
        "facets": reader.facets(),
        "counters": reader.counters(),
    }


def _show(reader: SpanReader, request: Request) -> dict[str, Any]:
    trace_id = reader.find(request.path_params["trace_id"])
    return trace_view(reader.spans(trace_id), reader.summary(trace_id), reader.linked(trace_id))


def _export(reader: SpanReader, request: Request) -> dict[str, Any]:
    kind = request.query_params.get("format", "chrome")
    if kind not in EXPORTS:
        raise BadQuery(f"format is {kind!r}; known: {', '.join(EXPORTS)}")
    return EXPORTS[kind](reader.spans(reader.find(request.path_params["trace_id"])))


def _latency(reader: SpanReader, request: Request) -> dict[str, Any]:
    metric = request.query_params.get("metric", "ttft")
    if metric not in METRICS:
        raise BadQuery(f"metric is {metric!r}; known: {', '.join(METRICS)}")
    traces = reader.newest(_filter(request), MAX_LIMIT)
    return {"clocks": [latency(traces, metric, clock) for clock in ("measured", "simulated")]}


def _filter(request: Request) -> Filter:
    get = request.query_params.get

    def seconds(name: str) -> float | None:
        value = _number(request, name)
        return value / 1e3 if value is not None else None

    return Filter(
        service=get("service", ""),
        status=get("status", ""),
        model=get("model", ""),
        tenant=get("tenant", ""),
        clock=get("clock", ""),
        text=get("q", ""),
        min_ttft_s=seconds("min_ttft_ms"),
        min_tpot_s=seconds("min_tpot_ms"),
        min_duration_s=seconds("min_duration_ms"),
        requests_only=get("all", "") != "1",
    )


def _number(request: Request, name: str) -> float | None:
    text = request.query_params.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e15:
        raise BadQuery(f"{name} is {text!r}; give a number from 0 on")
    return value
