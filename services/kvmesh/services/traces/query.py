"""Which traces a reader asks for, as SQL over the store's tables. Pure."""

from dataclasses import dataclass
from typing import Any

from kvmesh.services.traces.summary import ROUTER_SERVICE

MAX_LIMIT = 2_000


@dataclass(frozen=True, slots=True)
class Filter:
    """Empty or None: any. text: a piece of a span's name, attributes or events, in any case.

    status: "ok" or "error". clock: measured, simulated or mixed. Seconds throughout.
    requests_only: leaves out probes and other work of the mesh's own.
    """

    service: str = ""
    status: str = ""
    model: str = ""
    tenant: str = ""
    clock: str = ""
    text: str = ""
    min_ttft_s: float | None = None
    min_tpot_s: float | None = None
    min_duration_s: float | None = None
    requests_only: bool = True
    since_ns: int = 0

    def where(self) -> tuple[str, list[Any]]:
        """A condition over `traces t`, and its values."""
        parts: list[tuple[str, list[Any]]] = [("t.start_ns >= ?", [self.since_ns])]
        if self.requests_only:
            parts.append(("t.service = ?", [ROUTER_SERVICE]))
        for column, value in (("model", self.model), ("tenant", self.tenant)):
            if value:
                parts.append((f"t.{column} = ?", [value]))
        if self.service:
            inside = "EXISTS (SELECT 1 FROM members m WHERE m.trace_id = t.trace_id"
            parts.append((f"{inside} AND m.service = ?)", [self.service]))
        if self.status:
            parts.append(("t.errors > 0" if self.status == "error" else "t.errors = 0", []))
        if self.clock:
            parts.append((_CLOCKS.get(self.clock, "0"), []))
        limits = (("ttft_s", self.min_ttft_s), ("tpot_s", self.min_tpot_s))
        parts += [(f"t.{column} >= ?", [least]) for column, least in limits if least is not None]
        if self.min_duration_s is not None:
            parts.append(("t.end_ns - t.start_ns >= ?", [self.min_duration_s * 1e9]))
        if self.text:
            wanted = self.text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            inside = "EXISTS (SELECT 1 FROM spans s WHERE s.trace_id = t.trace_id"
            parts.append((f"{inside} AND s.record LIKE ? ESCAPE '\\')", [f"%{wanted}%"]))
        condition = " AND ".join(f"({text})" for text, _ in parts)
        return condition, [value for _, values in parts for value in values]


_CLOCKS = {
    "measured": "t.num_simulated = 0",
    "simulated": "t.num_simulated = t.num_spans",
    "mixed": "t.num_simulated > 0 AND t.num_simulated < t.num_spans",
}
