"""Mutated protobuf messages: of their fields, and of their bytes. Pure: `rng` makes them."""

import math
import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

MAX_COPIES = 40  # of an element of a repeated field
_INTS = (0, 1, 2, 63, 64, 127, 128, 65_535, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
         (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -(1 << 31), -(1 << 63))  # fmt: skip
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, math.inf, -math.inf, math.nan)
_STRINGS = ("", "a", "\x00", "é" * 50, "\U0001f600", "a" * 1500, "../..", "%s{}", "mini", "user",
            "127.0.0.1:1", "127.0.0.1", ":", "unix:/x", "dns:///x", "[::1]:99999", "(" * 30,
            '{"type": "object"}', "[" * 400, "a{1,9999}{1,9999}", "0" * 32)  # fmt: skip
_BYTES = (b"", b"\x00", b"\xff" * 15, b"k" * 16, b"k" * 17, b"\x05\x00\x00\x00hello",
          b"\xff\xff\xff\xff", b"x" * 5000)  # fmt: skip
_RANGES = {
    Field.TYPE_INT32: (-(1 << 31), 1 << 31), Field.TYPE_SINT32: (-(1 << 31), 1 << 31),
    Field.TYPE_SFIXED32: (-(1 << 31), 1 << 31), Field.TYPE_ENUM: (-(1 << 31), 1 << 31),
    Field.TYPE_UINT32: (0, 1 << 32), Field.TYPE_FIXED32: (0, 1 << 32),
    Field.TYPE_INT64: (-(1 << 63), 1 << 63), Field.TYPE_SINT64: (-(1 << 63), 1 << 63),
    Field.TYPE_SFIXED64: (-(1 << 63), 1 << 63),
    Field.TYPE_UINT64: (0, 1 << 64), Field.TYPE_FIXED64: (0, 1 << 64),
}  # fmt: skip


def mutated(rng: random.Random, seeds: Sequence[Message]) -> bytes:
    """Bytes of one of `seeds` with a few mutations of fields, of bytes, or of both."""
    message = type(seeds[0])()
    message.CopyFrom(rng.choice(seeds))
    kind = rng.randrange(10)
    if kind < 7:
        for _ in range(rng.randint(1, 4)):
            mutate_field(rng, message)
    data = message.SerializeToString()
    if kind in (5, 6, 7, 8):
        data = mutate_bytes(rng, data)
    return rng.randbytes(rng.randrange(200)) if kind == 9 and rng.random() < 0.5 else data


def mutate_field(rng: random.Random, message: Message) -> None:
    """Sets, clears or copies one field, at a random depth."""
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    present = [field for field, _ in message.ListFields()]
    field: Any = rng.choice(fields)
    if present and rng.random() < 0.6:
        field = rng.choice(present)
    if rng.random() < 0.1:
        message.ClearField(field.name)
    elif _is_map(field):
        _mutate_map(rng, getattr(message, field.name), field)
    elif field.is_repeated:
        _mutate_repeated(rng, getattr(message, field.name), field)
    elif field.type == Field.TYPE_MESSAGE:
        child = getattr(message, field.name)
        child.SetInParent()
        mutate_field(rng, child)
    else:
        setattr(message, field.name, _scalar(rng, field))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, doubles or inserts; where a length or a tag stands, it now lies."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.randrange(1, 9))
        act = rng.randrange(5)
        if act == 0 and place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        elif act == 1:
            data = data[:place] + data[end:]
        elif act == 2:
            data = data[:end] + data[place:]
        elif act == 3:
            data = data[:place]
        else:
            data = data[:place] + rng.randbytes(rng.randrange(1, 12)) + data[place:]
    return data


def _is_map(field: Field) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _mutate_map(rng: random.Random, values: Any, field: Field) -> None:
    assert field.message_type is not None
    entry = field.message_type.fields_by_name
    key = _scalar(rng, entry["key"])
    if values and rng.random() < 0.5:
        key = rng.choice(sorted(values))
    if entry["value"].type == Field.TYPE_MESSAGE:
        mutate_field(rng, values[key])
    else:
        values[key] = _scalar(rng, entry["value"])


def _mutate_repeated(rng: random.Random, values: Any, field: Field) -> None:
    message = field.type == Field.TYPE_MESSAGE
    if values and rng.random() < 0.3:
        del values[rng.randrange(len(values)) :]
    elif values and rng.random() < 0.5:
        place = rng.randrange(len(values))
        if message:
            mutate_field(rng, values[place])
        else:
            values[place] = _scalar(rng, field)
    else:
        for _ in range(rng.choice((1, 1, 2, MAX_COPIES))):
            if not message:
                values.append(_scalar(rng, field))
            elif values:
                values.add().CopyFrom(values[-1] if rng.random() < 0.5 else values[0])
            else:
                mutate_field(rng, values.add())


def _scalar(rng: random.Random, field: Field) -> Any:
    if field.type in _RANGES:
        low, high = _RANGES[field.type]
        return rng.choice([n for n in _INTS if low <= n < high])
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if field.type == Field.TYPE_BOOL:
        return rng.random() < 0.5
    return rng.choice(_STRINGS if field.type == Field.TYPE_STRING else _BYTES)
