"""What a store of spans holds, for those who ask, also while it is written."""

import json
import sqlite3
from pathlib import Path

from kvmesh.services.traces.query import MAX_LIMIT, Filter
from kvmesh.services.traces.spans import SIMULATED, Span
from kvmesh.services.traces.store import BUSY_S, ROOT_COLUMNS
from kvmesh.services.traces.summary import ROUTER_SERVICE, TraceSummary

_TRACES = (
    "SELECT t.*, (SELECT group_concat(member, char(10)) FROM members m "
    "WHERE m.trace_id = t.trace_id) AS members FROM traces t "
)


class SpanReader:
    """Reads a store, also while it is written. Raises FileNotFoundError if there is none."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(path)
        self._db = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
        self._db.execute("PRAGMA query_only = ON")
        self._db.row_factory = sqlite3.Row

    def __enter__(self) -> "SpanReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def newest(self, wanted: Filter, limit: int) -> list[TraceSummary]:
        """The newest traces that fit, newest first."""
        where, values = wanted.where()
        rows = self._db.execute(
            f"{_TRACES} WHERE {where} ORDER BY t.start_ns DESC LIMIT ?",
            [*values, max(1, min(limit, MAX_LIMIT))],
        )
        return [_summary(row) for row in rows]

    def spans(self, trace_id: str) -> list[Span]:
        """All spans of one trace; empty if it is not there."""
        rows = self._db.execute("SELECT record FROM spans WHERE trace_id = ?", [trace_id])
        return [Span(**json.loads(row["record"])) for row in rows]

    def find(self, wanted: str) -> str:
        """The id of the `last` request, or of the one trace whose id begins so.

        Raises LookupError, which names the candidates, if none or several fit.
        """
        if wanted == "last":
            newest = self.newest(Filter(), 1)
            if not newest:
                raise LookupError("no request is stored yet")
            return self._measured(newest[0]).trace_id
        low = wanted.lower()
        rows = self._db.execute(
            "SELECT trace_id FROM traces WHERE substr(trace_id, 1, ?) = ? LIMIT 6", [len(low), low]
        ).fetchall()
        ids = sorted(row["trace_id"] for row in rows)
        if not ids:
            raise LookupError(f"no trace {wanted}")
        if len(ids) > 1:
            raise LookupError(f"{wanted} fits several traces: {', '.join(ids[:5])}")
        return str(ids[0])

    def linked(self, trace_id: str) -> list[TraceSummary]:
        """Traces that this one links to, or that link to it."""
        rows = self._db.execute(
            "SELECT linked AS id FROM links WHERE trace_id = ? "
            "UNION SELECT trace_id FROM links WHERE linked = ?",
            [trace_id, trace_id],
        ).fetchall()
        return [s for row in rows if (s := self.summary(row["id"])) and row["id"] != trace_id]

    def _measured(self, trace: TraceSummary) -> TraceSummary:
        """The same request by the wall clock, whose trace has all its legs; or the trace itself."""
        if trace.clock != SIMULATED:
            return trace
        twins = [each for each in self.linked(trace.trace_id) if each.clock != SIMULATED]
        return twins[0] if twins else trace

    def simulated(self, trace_id: str) -> str:
        """The id of the same request by its simulated devices' clocks, be it this one's own.

        Raises LookupError if it has none.
        """
        own = self.summary(trace_id)
        for trace in [*([own] if own is not None else []), *self.linked(trace_id)]:
            if trace.clock == SIMULATED:
                return trace.trace_id
        raise LookupError(f"trace {trace_id} has no simulated times: its devices are measured")

    def summary(self, trace_id: str) -> TraceSummary | None:
        row = self._db.execute(f"{_TRACES} WHERE t.trace_id = ?", [trace_id]).fetchone()
        return _summary(row) if row is not None else None

    def facets(self) -> dict[str, list[str]]:
        """What there is to filter by."""
        found = {
            column: self._db.execute(
                f"SELECT DISTINCT {column} AS v FROM traces WHERE {column} != '' ORDER BY 1"
            ).fetchall()
            for column in ("model", "tenant")
        }
        found["service"] = self._db.execute(
            "SELECT DISTINCT service AS v FROM members WHERE service != '' ORDER BY 1"
        ).fetchall()
        return {name: [row["v"] for row in rows] for name, rows in found.items()}

    def num_spans(self) -> int:
        return int(self._db.execute("SELECT coalesce(sum(num_spans), 0) FROM traces").fetchone()[0])

    def counters(self) -> dict[str, int]:
        return {row["name"]: row["value"] for row in self._db.execute("SELECT * FROM counters")}

    def close(self) -> None:
        self._db.close()


def _summary(row: sqlite3.Row) -> TraceSummary:
    mixed = 0 < row["num_simulated"] < row["num_spans"]
    clock = "mixed" if mixed else "simulated" if row["num_simulated"] else "measured"
    return TraceSummary(
        trace_id=row["trace_id"],
        start_ns=row["start_ns"],
        duration_ms=(row["end_ns"] - row["start_ns"]) / 1e6,
        num_spans=row["num_spans"],
        members=tuple(sorted(set((row["members"] or "").split("\n")))),
        errors=row["errors"],
        is_request=row["service"] == ROUTER_SERVICE,
        clock=clock,
        **{column: row[column] for column in ROOT_COLUMNS},
    )
