"""Spans in one SQLite file, bounded by age and by bytes. One writer, here; readers in reader.py."""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.services.traces.summary import Part

SCHEMA_VERSION = 1
BUSY_S = 2.0  # that a writer waits for a reader's lock
# What a prune by size leaves: a store at its limit would otherwise prune with each batch.
KEEP_FRACTION = 0.9

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spans (
    trace_id TEXT NOT NULL, span_id TEXT NOT NULL, record TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS spans_by_id ON spans (trace_id, span_id);
CREATE TABLE IF NOT EXISTS traces (
    trace_id TEXT PRIMARY KEY, start_ns INTEGER, end_ns INTEGER, num_spans INTEGER,
    num_simulated INTEGER, errors INTEGER, num_bytes INTEGER, has_parent INTEGER,
    root_ns INTEGER, name TEXT, service TEXT, model TEXT, tenant TEXT, ttft_s REAL, tpot_s REAL,
    input_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER, cost_usd REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS traces_by_start ON traces (start_ns);
CREATE TABLE IF NOT EXISTS members (
    trace_id TEXT, member TEXT, service TEXT, PRIMARY KEY (trace_id, member, service)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS links (
    trace_id TEXT, linked TEXT, PRIMARY KEY (trace_id, linked)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS links_back ON links (linked);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
"""

# Of the span that a trace is named by: its root, or the best of those that came so far.
ROOT_COLUMNS = (
    "name", "service", "model", "tenant", "ttft_s", "tpot_s",
    "input_tokens", "cached_tokens", "output_tokens", "cost_usd",
)  # fmt: skip
_BETTER = "(excluded.has_parent, excluded.root_ns) < (traces.has_parent, traces.root_ns)"
_ROOT_UPDATE = ", ".join(
    f"{c} = CASE WHEN {_BETTER} THEN excluded.{c} ELSE traces.{c} END" for c in ROOT_COLUMNS
)
_INSERT = "INSERT OR IGNORE INTO spans VALUES (?, ?, ?)"
_UPSERT = f"""
INSERT INTO traces (trace_id, start_ns, end_ns, num_spans, num_simulated, errors, num_bytes,
    has_parent, root_ns, {", ".join(ROOT_COLUMNS)})
VALUES ({", ".join("?" * (9 + len(ROOT_COLUMNS)))})
ON CONFLICT (trace_id) DO UPDATE SET
    start_ns = min(start_ns, excluded.start_ns), end_ns = max(end_ns, excluded.end_ns),
    num_spans = num_spans + excluded.num_spans,
    num_simulated = num_simulated + excluded.num_simulated,
    errors = errors + excluded.errors, num_bytes = num_bytes + excluded.num_bytes,
    {_ROOT_UPDATE},
    has_parent = CASE WHEN {_BETTER} THEN excluded.has_parent ELSE has_parent END,
    root_ns = CASE WHEN {_BETTER} THEN excluded.root_ns ELSE root_ns END
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """max_bytes: of the file, its log aside; max_age_s: of a trace since its last span."""

    max_bytes: int
    max_age_s: float


class SpanStore:
    """The writer. Raises sqlite3.Error for a file that cannot be used, or OSError for a folder."""

    def __init__(self, path: Path, limits: Limits) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._limits = limits
        self._db = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
        try:
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute("PRAGMA journal_mode = WAL")
            # A crash of the machine may cost the last traces, never the file.
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.execute("PRAGMA journal_size_limit = 4194304")
            self._db.execute("PRAGMA cache_size = -4096")
            if self._version() not in (0, SCHEMA_VERSION):
                raise sqlite3.DatabaseError(f"{path} has version {self._version()}")
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            self._db.close()
            raise
        path.chmod(0o600)

    def append(self, records: Sequence[dict[str, Any]], counts: Mapping[str, int]) -> None:
        """All of it or, with an exception, nothing. counts: added to the counters of that name.

        A span that is stored already (a retry of its sender) is not counted again.
        """
        rows = [
            (r["trace_id"], r["span_id"], json.dumps(r, separators=(",", ":"), ensure_ascii=False))
            for r in records
        ]
        with self._db:
            if self._db.executemany(_INSERT, rows).rowcount < len(rows):
                self._db.rollback()
                pairs = [
                    (record, row)
                    for record, row in zip(records, rows, strict=True)
                    if self._db.execute(_INSERT, row).rowcount
                ]
                records, rows = [r for r, _ in pairs], [row for _, row in pairs]
            self._relate(records, [len(row[2]) for row in rows])
            self._count(counts)

    def prune(self, now_s: float) -> int:
        """Removes what is too old, then the oldest traces while the file is too large.

        now_s: Unix seconds. Returns how many traces went.
        """
        oldest = int((now_s - self._limits.max_age_s) * 1e9)
        removed = self._remove("end_ns < ?", [oldest])
        used = self.used_bytes()
        if used > self._limits.max_bytes:
            excess = used - KEEP_FRACTION * self._limits.max_bytes
            removed += self._remove_oldest(excess / used)
        # A script is stepped to its end; execute() would free a single page.
        self._db.executescript("PRAGMA incremental_vacuum")
        return removed

    def used_bytes(self) -> int:
        pages = self._one("PRAGMA page_count") - self._one("PRAGMA freelist_count")
        return pages * self._one("PRAGMA page_size")

    def close(self) -> None:
        self._db.close()

    def _relate(self, records: Sequence[dict[str, Any]], sizes: Sequence[int]) -> None:
        """Adds new spans to what is known of their traces."""
        parts: dict[str, Part] = {}
        for record, size in zip(records, sizes, strict=True):
            part = parts.setdefault(record["trace_id"], Part(record["start_ns"]))
            part.add(record, size)
        self._db.executemany(_UPSERT, [_columns(*item) for item in parts.items()])
        members = {(r["trace_id"], r["member"], r["service"]) for r in records}
        self._db.executemany("INSERT OR IGNORE INTO members VALUES (?, ?, ?)", members)
        links = {(r["trace_id"], link["trace_id"]) for r in records for link in r["links"]}
        self._db.executemany("INSERT OR IGNORE INTO links VALUES (?, ?)", links)

    def _count(self, counts: Mapping[str, int]) -> None:
        self._db.executemany(
            "INSERT INTO counters VALUES (?, ?) "
            "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            [(name, value) for name, value in counts.items() if value],
        )

    def _remove_oldest(self, fraction: float) -> int:
        """Traces from the oldest on that hold this fraction of all bytes of spans."""
        least = self._one("SELECT sum(num_bytes) FROM traces") * fraction
        seen, last = 0, 0
        for size, start in self._db.execute(
            "SELECT num_bytes, start_ns FROM traces ORDER BY start_ns"
        ):
            seen, last = seen + size, start
            if seen >= least:
                break
        return self._remove("start_ns <= ?", [last])

    def _remove(self, where: str, values: list[Any]) -> int:
        chosen = f"SELECT trace_id FROM traces WHERE {where}"
        with self._db:
            for table in ("spans", "members", "links"):
                self._db.execute(f"DELETE FROM {table} WHERE trace_id IN ({chosen})", values)
            return self._db.execute(f"DELETE FROM traces WHERE {where}", values).rowcount

    def _version(self) -> int:
        return self._one("PRAGMA user_version")

    def _one(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0] or 0)


def _columns(trace_id: str, part: Part) -> tuple[Any, ...]:
    head = (trace_id, part.start_ns, part.end_ns, part.num_spans, part.num_simulated)
    rank = (part.errors, part.num_bytes, int(part.rank[0]), part.rank[1])
    return (*head, *rank, *(part.root[column] for column in ROOT_COLUMNS))
