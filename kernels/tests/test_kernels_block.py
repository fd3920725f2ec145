"""Block bytes: geometry, what verify refuses, and that no flipped bit passes."""

import dataclasses
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.kernels import block, codebook, errors, rotation
from kvmesh.kernels.layout import CODECS, KvLayout, plane_bytes

LAYOUT = KvLayout(2, 1, 32, "k4v4", bytes(range(16)))


def sealed(layout: KvLayout = LAYOUT) -> np.ndarray:
    data = np.random.default_rng(0).integers(0, 256, layout.block_bytes, np.uint8)
    block.finish(layout, data)
    return data


SEALED = sealed().tobytes()
DOCUMENT = Path(__file__).parents[2] / "docs" / "codec.md"
WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


def drawn_fields(text: str) -> list[tuple[int, int, str]]:
    """Offset, size in bytes and name of each field of fixed size that a diagram draws."""
    rows = re.findall(r"^ +(-?\d+) +(?:(u\d+)|(\d+) B|(\".*\")) ?(.*)$", text, re.MULTILINE)
    fields = []
    for at, kind, count, quoted, name in rows:
        size = WIDTHS[kind] if kind else int(count) if count else len(quoted) - 2
        fields.append((int(at), size, name or quoted))
    return fields


def test_the_diagram_is_true():
    """Offsets follow each other, and each field of a sealed block holds what is written there."""
    layout = KvLayout(3, 2, 80, "k3v3", bytes(range(1, 17)), ("k8v8", "k3v3", "fp16"))
    data = sealed(layout).tobytes()
    fields = drawn_fields(block.__doc__)
    header = [field for field in fields if 0 <= field[0] < 64]
    ends = [0, *(at + size for at, size, _ in header)]
    assert ends == [*(at for at, _, _ in header), 64]
    found = {name.split(":")[0]: data[at : at + size] for at, size, name in header}
    assert found.pop('"KVMB"') == b"KVMB"
    assert found.pop("model fingerprint") == layout.fingerprint
    assert {name: int.from_bytes(value, "little") for name, value in found.items()} == {
        "format version": block.FORMAT_VERSION,
        "codec id": CODECS["k3v3"].codec_id,
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 80,
        "num_tokens (64)": 64,
        "codebook version": codebook.CODEBOOK_VERSION,
        "payload bytes": len(data) - 3 * 64,
        "rotation seed": rotation.ROTATION_SEED,
        "size of the table of layers": 64,
        "zero": 0,
    }
    assert list(data[64:67]) == [CODECS[name].codec_id for name in layout.layer_codecs]
    assert [field[:2] for field in fields[-2:]] == [(-64, 60), (-4, 4)]
    assert not any(data[-64:-4])
    assert int.from_bytes(data[-4:], "little") == zlib.crc32(data[:-4])


def test_the_document_draws_what_the_code_draws():
    drawn = re.findall(r"^    (\S.*|    +\S.*)$", block.__doc__, re.MULTILINE)
    missing = [line for line in drawn if line not in DOCUMENT.read_text(encoding="utf-8")]
    assert len(drawn) > 25 and not missing


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
def test_planes_tile_the_block(codec, dim):
    layout = KvLayout(3, 2, dim, codec, bytes(16))
    at = layout.header_bytes
    for layer in range(3):
        planes = layout.planes(layer)
        for start, size in (
            (planes.key_codes, 2 * plane_bytes(dim, 64, planes.codec.key_bits)),
            (planes.value_codes, 2 * plane_bytes(64, dim, planes.codec.value_bits)),
            (planes.key_scales, 256 * (planes.codec.key_bits <= 8)),
            (planes.value_scales, 256 * (planes.codec.value_bits <= 8)),
        ):
            assert start == at and start % 64 == 0
            at += size
    assert layout.block_bytes == at + 64 and layout.block_bytes % 64 == 0
    assert block.verify(sealed(layout), layout).layout == layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "k5v5"}, "codec is 'k5v5', must be one of fp32, fp16, k8v8, k4v4, k4v3"),
        ({"head_dim": 100}, r"head_dim is 100, must be a multiple of 16 in 32\.\.256"),
        ({"head_dim": 104}, "head_dim is 104, .* that has a Hadamard matrix"),
        ({"head_dim": 512}, "head_dim is 512"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_kv_heads": 1 << 16}, "num_kv_heads is 65536"),
        ({"fingerprint": b"short"}, "fingerprint has 5 bytes, must have 16"),
    ],
)
def test_layout_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LAYOUT, **change)


def test_header_says_what_was_sealed():
    header = block.verify(SEALED, LAYOUT)
    assert header == block.parse_header(memoryview(SEALED)[:64])
    assert (header.layout, header.num_tokens) == (LAYOUT, 64)
    assert header.payload_bytes == LAYOUT.payload_bytes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fingerprint": bytes(16)}, errors.WrongFingerprint, "fingerprint is 0001.*expected 0000"),
        ({"codec": "fp16"}, errors.WrongLayout, "codec is k4v4, expected fp16"),
        ({"num_layers": 3}, errors.WrongLayout, "num_layers is 2, expected 3"),
        ({"head_dim": 64}, errors.WrongLayout, "head_dim is 32, expected 64"),
    ],
)
def test_another_models_block_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        block.verify(SEALED, dataclasses.replace(LAYOUT, **change))


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (0, b"X", errors.BadMagic),
        (4, b"\x09", errors.WrongVersion),
        (6, b"\x63", errors.WrongLayout),
        (30, b"\x21", errors.WrongLayout),
        (32, b"\x3f", errors.WrongLayout),
        (36, b"\x09", errors.WrongVersion),
        (40, b"\x01", errors.WrongLayout),
        (48, b"\x00", errors.WrongVersion),
        (8, b"\xff", errors.ChecksumMismatch),
    ],
)
def test_each_header_field_has_its_error(offset, value, error):
    with pytest.raises(error):
        block.verify(SEALED[:offset] + value + SEALED[offset + 1 :])


@given(st.integers(0, len(SEALED) * 8 - 1))
@settings(deadline=None, max_examples=500)
def test_any_flipped_bit_is_found(bit):
    damaged = bytearray(SEALED)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(errors.BlockError):
        block.verify(damaged)


def test_every_bit_of_header_and_trailer_is_guarded():
    ends = [*range(64 * 8), *range((len(SEALED) - 64) * 8, len(SEALED) * 8)]
    for bit in ends:
        test_any_flipped_bit_is_found.hypothesis.inner_test(bit)


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: SEALED[:64] + tail))
@settings(deadline=None)
def test_arbitrary_bytes_never_verify(data):
    with pytest.raises(errors.BlockError):
        block.verify(data, LAYOUT)


def test_truncated_and_padded_blocks_are_short():
    for data in (SEALED[:-1], SEALED + b"\0", SEALED[:63], b""):
        with pytest.raises(errors.ShortBlock, match="bytes"):
            block.verify(data, LAYOUT)


def test_finish_wants_a_whole_block():
    with pytest.raises(errors.ShortBlock, match="expected"):
        block.finish(LAYOUT, np.zeros(10, np.uint8))
