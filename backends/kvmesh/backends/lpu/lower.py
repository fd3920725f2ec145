"""A Llama layer, the head and the way between stages as operations of one chip of a group.

All chips of a group run the same program in step, each on its own heads, columns and rows.
"""

from dataclasses import dataclass
from math import ceil

from kvmesh.backends.lpu.operations import FP16, FP32, Operations, Weights
from kvmesh.backends.lpu.schedule import Value
from kvmesh.backends.lpu.shapes import ModelShape, kv_bits
from kvmesh.kernels.layout import CODECS

_DECODE_OPS = 3  # of a code: take it out of its byte, look its level up, times the scale
_ENCODE_ALUS = 6  # scale, and a comparison tree over the levels, then pack


@dataclass(frozen=True, slots=True)
class Work:
    """What one program does: `tokens` new tokens of one sequence with `context` before them."""

    shape: ModelShape
    group: int
    codec: str
    context: int
    tokens: int = 1


class Lowering:
    """Adds parts of a model to a schedule."""

    def __init__(self, operations: Operations, work: Work) -> None:
        self._ops, self._work = operations, work
        self._lanes = operations.chip.vector_bytes
        self._compressed = CODECS[work.codec].key_scales

    def input(self) -> Value:
        """The hidden state as it lies in memory: FP16 [ceil(hidden / 320)] x tokens."""
        return self._ops.schedule.constant(self._vectors(self._work.shape.hidden), FP16)

    def layer(self, x: Value) -> Value:
        """The hidden state after one layer."""
        ops, shape, group = self._ops, self._work.shape, self._work.group
        tokens, hidden = self._work.tokens, shape.hidden
        attended = self._attention(self._norm("norm 1", x))
        rows = shape.heads // group * shape.head_dim
        partial = ops.matmul("output", attended, (tokens, rows, hidden))
        return self.ffn(self._sum("sum 1", partial, x))

    def ffn(self, x: Value) -> Value:
        """The hidden state after a layer's second half."""
        ops, shape, group = self._ops, self._work.shape, self._work.group
        tokens, hidden = self._work.tokens, shape.hidden
        h = self._norm("norm 2", x)
        ffn = ceil(shape.ffn / group)
        gate = ops.matmul("gate", h, (tokens, hidden, ffn))
        up = ops.matmul("up", h, (tokens, hidden, ffn))
        h = ops.vxm("silu", (gate, up), alus=6)
        partial = ops.matmul("down", h, (tokens, ffn, hidden))
        return self._sum("sum 2", partial, x)

    def head(self, x: Value) -> Value:
        """The largest logit of this chip's share of the vocabulary, told to the others."""
        ops, work = self._ops, self._work
        h = self._norm("norm", x)
        shape = (work.tokens, work.shape.hidden, ceil(work.shape.vocab / work.group))
        logits = ops.matmul("head", h, shape)
        best = ops.vxm("argmax", (logits,), (work.tokens, FP32), 2)
        best = ops.reduce_lanes("argmax", best)
        if work.group > 1:
            best = ops.exchange(
                "argmax", ops.vxm("argmax", (best,)), work.group - 1, work.group - 1
            )
        return best

    def handoff(self, x: Value) -> Value:
        """From stage to stage: each chip sends its share over one link, and the others theirs."""
        ops, work = self._ops, self._work
        share = ops.schedule.constant(self._vectors(ceil(work.shape.hidden / work.group)), FP16)
        taken = ops.exchange("handoff", share, 1)
        if work.group == 1:
            return taken
        return ops.exchange("handoff", taken, work.group - 1, work.group - 1)

    def _vectors(self, lanes: int) -> int:
        return ceil(lanes / self._lanes) * self._work.tokens

    def _norm(self, label: str, x: Value) -> Value:
        """RMS norm; its weights are multiplied into the matrix that follows."""
        squares = self._ops.vxm(label, (x,), (self._work.tokens, FP32), 2)
        total = self._ops.reduce_lanes(label, squares)
        return self._ops.vxm(label, (x, total), alus=4)

    def _attention(self, h: Value) -> Value:
        """From the normed state to this chip's heads side by side, FP16."""
        ops, work = self._ops, self._work
        shape, group, tokens = work.shape, work.group, work.tokens
        heads, kv_heads = shape.heads // group, shape.kv_heads // group
        width = (heads + 2 * kv_heads) * shape.head_dim
        qkv = ops.matmul("qkv", h, (tokens, shape.hidden, width))
        qkv = ops.vxm("qkv", (qkv,))
        turned = ops.permute("rope", qkv, qkv.beats)
        qkv = ops.vxm("rope", (qkv, turned), alus=3)
        split = ops.permute("heads", qkv, (heads + 2 * kv_heads) * tokens)
        if self._compressed:
            split = self._rotate("rotate q k v", split)
            self._encode(split, 2 * kv_heads * tokens)
        out = self._attend(split, heads * tokens, kv_heads)
        if self._compressed:
            out = self._rotate("rotate back", out)
        return ops.permute("heads", out, self._vectors(heads * shape.head_dim))

    def _rotate(self, label: str, x: Value) -> Value:
        """Every head times the codec's rotation, a matrix of head_dim x head_dim."""
        dim = self._work.shape.head_dim
        turned = self._ops.matmul(label, x, (x.beats, dim, dim))
        return self._ops.vxm(label, (turned,))

    def _encode(self, split: Value, vectors: int) -> None:
        """What sealing costs per token: norms, codes. Nothing in this step reads the codes."""
        norms = self._ops.vxm("encode", (split,), (vectors, FP32), 2)
        norms = self._ops.reduce_lanes("encode", norms)
        self._ops.vxm("encode", (split, norms), (vectors, 1), _ENCODE_ALUS)

    def _attend(self, q: Value, rows: int, kv_heads: int) -> Value:
        """Softmax of q K, times V, K and V decoded on their way from memory to the MXM."""
        ops, work = self._ops, self._work
        dim, context = work.shape.head_dim, work.context
        key_bits, value_bits = kv_bits(work.codec, work.shape)
        decode = _DECODE_OPS if self._compressed else 1
        keys, values = Weights(key_bits, decode), Weights(value_bits, decode)
        per_head = rows // kv_heads
        result = ops.schedule.allocate(rows, FP16)
        shape = per_head, dim, context
        scores = [ops.matmul("q K", q, shape, keys, head * per_head) for head in range(kv_heads)]
        softmax = [self._softmax(each, per_head) for each in scores]
        for head, (p, total) in enumerate(softmax):
            out = ops.matmul("p V", p, (per_head, context, dim), values)
            ops.vxm("softmax", (out, total), alus=2, into=(result, head * per_head))
        return result

    def _softmax(self, scores: Value, rows: int) -> tuple[Value, Value]:
        """(exponentials, FP16; their sums, one vector per row)."""
        ops = self._ops
        largest = ops.vxm("softmax", (scores,), (rows, FP32))
        largest = ops.reduce_lanes("softmax", largest)
        p = ops.vxm("softmax", (scores, largest), alus=6)
        total = ops.vxm("softmax", (p,), (rows, FP32))
        return p, ops.reduce_lanes("softmax", total)

    def _sum(self, label: str, partial: Value, x: Value) -> Value:
        """Partial sums of all chips of the group plus the state that was, on each chip.

        Each chip adds up its share of the lanes, then all tell theirs to all.
        """
        ops, group = self._ops, self._work.group
        if group == 1:
            return ops.vxm(label, (partial, x), (x.beats, FP16), 2)
        peers = group - 1
        share = ceil(self._vectors(self._work.shape.hidden) / group)
        mine = ops.vxm(label, (partial,), (peers * share, FP16))
        others = ops.exchange(label, mine, peers)
        added = ops.vxm(label, (others, partial), (share, FP16), 2)
        told = ops.exchange(label, added, peers, peers)
        x = ops.vxm(label, (x, added))
        return ops.vxm(label, (told, x), (x.beats, FP16))
