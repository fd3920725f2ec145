"""Trains the bundled model from scratch; resumes from its checkpoint when there is one."""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from pathlib import Path

import torch
from data import Batches
from initial import initialise
from model import Mini, MiniConfig
from torch import Tensor
from torch.nn import functional as F

DEFAULT_TOKENIZER = Path(__file__).parents[2] / "backends/kvmesh/backends/bundled/mini"
SEED = 1
LEARNING_RATE = 2e-3
BATCH_TOKENS = 4096
KV_NOISE = 0.12


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where checkpoints go")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER / "tokenizer.json")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--minutes", type=float, default=66.0, help="length of the schedule")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--tokens", type=int, default=BATCH_TOKENS, help="tokens in a batch")
    parser.add_argument("--noise", type=float, default=KV_NOISE, help="K/V error, after a while")
    parser.add_argument("--start", type=Path, help="weights to begin from, instead of random ones")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


# From each share of the schedule on: sequence lengths, and how often each is drawn.
PHASES = (
    (0.0, {128: 1}),
    (0.06, {128: 1, 256: 3}),
    (0.18, {256: 1, 512: 2}),
    (0.36, {256: 2, 512: 4, 1024: 4}),
    (0.70, {256: 2, 512: 3, 1024: 4, 2048: 2}),
    (0.85, {256: 2, 512: 3, 1024: 5, 2048: 2, 4096: 1}),
)
NOISE_BEGIN = 0.25


def length_at(share: float, step: int) -> int:
    """Draws the sequence length of a step."""
    table = [lengths for begin, lengths in PHASES if share >= begin][-1]
    return random.Random(step).choices(list(table), list(table.values()))[0]


class NoisePool:
    """Gaussian numbers drawn once and read from random places: drawing anew costs too much."""

    def __init__(self, config: MiniConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self.config = config
        self.pool = (torch.randn(1 << 23) / math.sqrt(config.head_dim)).to(torch.bfloat16)
        self.random = random.Random(seed)

    def fields(self, rows: int, length: int, level: float) -> list[Tensor]:
        """Returns K and V errors for each layer."""
        shape = (2, rows, self.config.num_key_value_heads, length, self.config.head_dim)
        size = math.prod(shape)
        starts = [
            self.random.randrange(0, len(self.pool) - size, 64)
            for _ in range(self.config.num_hidden_layers)
        ]
        return [(self.pool[start : start + size] * level).view(shape) for start in starts]


def learning_rate(base: float, share: float, step: int) -> float:
    """Warms up over 50 steps, stays, and falls to a twentieth over the last half."""
    fall = 1.0 if share < 0.5 else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (share - 0.5) / 0.5))
    return base * min(1.0, (step + 1) / 50) * fall


def loss_of(
    model: Mini, batch: tuple[Tensor, Tensor, Tensor], noise: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Returns the weighted loss and the share of answer tokens that are predicted right."""
    inputs, targets, weights = batch
    # Low weights become a chance to be counted, so most positions need no output scores.
    chosen = weights > torch.rand_like(weights)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(inputs, noise)[chosen]
        logits = model.logits(hidden)
    logits = logits.float()
    loss = F.cross_entropy(logits, targets[chosen])
    answers = weights[chosen] >= 1.0
    with torch.no_grad():
        right = (logits.argmax(-1) == targets[chosen])[answers].float().mean()
    return loss, right


def optimiser_for(model: Mini, lr: float) -> torch.optim.AdamW:
    """Makes AdamW with weight decay on matrices only."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-9, fused=True)


class Run:
    """The state of a training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = Mini(MiniConfig())
        initialise(self.model, args.seed)
        if args.start:
            self.model.load_state_dict(torch.load(args.start)["model"])
        self.optimiser = optimiser_for(self.model, args.lr)
        self.batches = Batches(args.tokenizer)
        self.pool = NoisePool(self.model.config, args.seed)
        self.step, self.seconds = 0, 0.0
        self.file = args.folder / "checkpoint.pt"
        args.folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            state = torch.load(self.file)
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.seconds = state["step"], state["seconds"]
        if args.compile:
            self.model.hidden = torch.compile(self.model.hidden, dynamic=False)
            torch._dynamo.config.recompile_limit = 32

    def save(self) -> None:
        """Writes the checkpoint in one rename."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def train_step(self, share: float) -> tuple[int, float, float]:
        """Takes one step; returns the length, the loss and the answer accuracy."""
        length = length_at(share, self.step)
        rows = max(1, self.args.tokens // length)
        quiet = share < NOISE_BEGIN or self.args.noise == 0
        noise = None if quiet else self.pool.fields(rows, length, self.args.noise)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.args.lr, share, self.step)
        seed = self.args.seed * 1_000_000 + self.step
        batch = self.batches.batch(seed, rows, length)
        loss, right = loss_of(self.model, batch, noise)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return length, loss.item(), right.item()

    def train(self) -> None:
        """Trains until the schedule ends."""
        end, saved, log = self.args.minutes * 60, self.seconds, []
        while self.seconds < end:
            begin = time.monotonic()
            length, loss, right = self.train_step(self.seconds / end)
            # A compilation or a pause must not eat the schedule.
            self.seconds += min(time.monotonic() - begin, 10.0)
            log.append((length, loss, right))
            if self.step % 20 == 0:
                mean = [sum(column) / len(log) for column in zip(*log, strict=True)]
                text = f"length {mean[0]:.0f} loss {mean[1]:.4f} answer tokens {mean[2]:.4f}"
                print(f"{self.step} {self.seconds:.0f}s {text}", flush=True)
                log.clear()
            if self.seconds - saved > 90:
                self.save()
                saved = self.seconds
        self.save()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    Run(arguments()).train()
