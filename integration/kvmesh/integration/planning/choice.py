"""What is compared: a device, a layout and what is switched on, written in one line.

gb300                            the layout that serves the workload best, the device's formats
gb300,dep16,mtp3,disagg,p2       16 attention replicas that share the experts, 3 drafts, prompts
                                 computed on pools of 2
h100,tp8,bf16,kv=k4v4,price=rental
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvmesh.backends.architectures import KV_FORMATS, WEIGHT_BYTES, ModelShape
from kvmesh.backends.cost.memory import plan_memory
from kvmesh.backends.cost.parallel import Formats, Parallel, check_parallel
from kvmesh.backends.cost.price import Price, price_of
from kvmesh.backends.cost.rates import check_timed
from kvmesh.backends.devices import load_device
from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import ShapeError
from kvmesh.services.common.errors import ConfigError

# Chance that a draft is accepted if those before it were, by position: the mean of the measured
# acceptance lengths of three models that think (SPEED-Bench coding).
ACCEPTANCE = (0.79, 0.61, 0.46)
MOST_DRAFTS = len(ACCEPTANCE)
DEGREES = re.compile(r"(tp|pp|ep|dep|dp|mtp|p)(\d+)")


class ChoiceError(ConfigError):
    """A choice that cannot be read or run; the message names the part, its value and its limit."""


@dataclass(frozen=True, slots=True)
class Choice:
    """parallel: None lets the planner lay the model out. prefill: of the pool that computes
    prompts, None where decoding workers do."""

    label: str
    device: Device
    price: Price
    formats: Formats
    parallel: Parallel | None = None
    drafts: int = 0
    prefill: Parallel | None = None


@dataclass(slots=True)
class _Parts:
    """What a line says, before it is put together."""

    degrees: dict[str, int] = field(default_factory=dict)
    weights: str | None = None
    kv: str = "fp8"
    price: str | None = None
    per_hour: float | None = None
    disagg: bool = False


def read_choice(text: str, folder: Path | None = None) -> Choice:
    """Raises ChoiceError for a part that is not understood, DeviceError for an unknown device or
    price, ShapeError for a layout that cannot be."""
    name, *rest = [part.strip() for part in text.split(",")]
    device = load_device(name, folder)
    parts = _Parts()
    for part in rest:
        _take(part, parts, text)
    drafts = parts.degrees.get("mtp", 0)
    if drafts > MOST_DRAFTS:
        raise ChoiceError(f"{text}: mtp is {drafts}, must be at most {MOST_DRAFTS}")
    weights = parts.weights or default_weights(device)
    attention = "fp8" if weights in ("nvfp4", "mxfp4") and "fp8" in device.peak else None
    return Choice(
        text,
        device,
        price_of(device, parts.price, parts.per_hour),
        Formats(weights, parts.kv, attention),
        layout_of(parts.degrees, text),
        drafts,
        Parallel(tensor=parts.degrees.get("p", 1)) if parts.disagg else None,
    )


def default_weights(device: Device) -> str:
    """The smallest weights that the device multiplies as they are."""
    return next((w for w in ("nvfp4", "fp8", "int8") if w in device.peak), "bf16")


def _take(part: str, parts: _Parts, text: str) -> None:
    key, _, value = part.partition("=")
    degree = DEGREES.fullmatch(part)
    if degree:
        parts.degrees[degree[1]] = int(degree[2])
    elif part in WEIGHT_BYTES:
        parts.weights = part
    elif part == "disagg":
        parts.disagg = True
    elif key == "kv":
        if value not in KV_FORMATS:
            raise ChoiceError(f"{text}: kv is {value!r}, must be one of {', '.join(KV_FORMATS)}")
        parts.kv = value
    elif key == "price":
        _take_price(value, parts, text)
    else:
        raise ChoiceError(
            f"{text}: {part!r} is not understood; known: tp8, pp2, dp4, ep8, dep16, mtp3, disagg, "
            f"p2, kv=..., price=..., {', '.join(WEIGHT_BYTES)}"
        )


def _take_price(value: str, parts: _Parts, text: str) -> None:
    try:
        parts.per_hour = float(value)
    except ValueError:
        parts.price = value
        return
    if not 0 <= parts.per_hour < float("inf"):
        raise ChoiceError(f"{text}: price is {value}, must be at least 0 dollars per hour")


def layout_of(degrees: dict[str, int], text: str) -> Parallel | None:
    """Raises ChoiceError, which begins with `text`; None where no degree is named."""
    if not degrees.keys() & {"tp", "pp", "ep", "dep", "dp"}:
        return None
    if "dep" in degrees and degrees.keys() & {"dp", "ep"}:
        raise ChoiceError(f"{text}: dep says dp and ep at once; name either")
    data = degrees.get("dep", degrees.get("dp", 1))
    expert = degrees.get("dep", degrees.get("ep", 1))
    try:
        return Parallel(degrees.get("tp", 1), data, expert, degrees.get("pp", 1))
    except ShapeError as error:
        raise ChoiceError(f"{text}: {error}") from None


def layouts(choice: Choice, model: ModelShape) -> list[Parallel]:
    """The layouts to try: the choice's own, or those within one scale-up domain that hold it.

    Raises DoesNotFit if none does, naming what it takes; DeviceError for a device without a cost
    by op.
    """
    check_timed(choice.device)
    if choice.parallel is not None:
        plan_memory(choice.device, model, choice.parallel, choice.formats, mtp=choice.drafts > 0)
        return [choice.parallel]
    found = [each for each in _candidates(choice.device, model) if _fits(choice, model, each)]
    if not found:  # says what would hold it
        plan_memory(choice.device, model, Parallel(), choice.formats, mtp=choice.drafts > 0)
    return found


def _candidates(device: Device, model: ModelShape) -> list[Parallel]:
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= device.domain]
    made = [Parallel(tensor=n, expert=_experts(model, n)) for n in sizes]
    if model.moe is not None:
        made += [Parallel(data=n, expert=n) for n in sizes if n > 1]
    stages = [Parallel(tensor=t, pipeline=s) for t in sizes for s in (2, 4) if model.moe is None]
    return made + [each for each in stages if each.devices <= device.domain]


def _experts(model: ModelShape, ranks: int) -> int:
    return min(ranks, model.moe.experts) if model.moe is not None else 1


def _fits(choice: Choice, model: ModelShape, parallel: Parallel) -> bool:
    try:
        check_parallel(model, parallel)
        plan_memory(choice.device, model, parallel, choice.formats, mtp=choice.drafts > 0)
    except ShapeError:
        return False
    return True


def prefill_layout(choice: Choice, model: ModelShape) -> Parallel | None:
    """Of the pool for prompts: as many devices as asked for, by expert and attention replicas
    where there are experts, else by tensor."""
    if choice.prefill is None:
        return None
    devices = choice.prefill.tensor
    if model.moe is not None and devices > 1:
        return Parallel(data=devices, expert=devices)
    return replace(choice.prefill, expert=_experts(model, devices))
