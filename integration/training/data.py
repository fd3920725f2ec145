"""Turns generated conversations into padded batches of tokens and loss weights."""

from __future__ import annotations

from pathlib import Path

import torch
from corpus import Talk, Turn, make_talk
from tokenizers import Tokenizer
from torch import Tensor


class Batches:
    """Encodes conversations by seed; the same seeds always give the same batch."""

    def __init__(self, tokenizer_file: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.ids = {
            name: self.tokenizer.token_to_id(f"<|{name}|>")
            for name in ("pad", "begin", "end", "system", "user", "assistant")
        }
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Encodes plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def turn(self, turn: Turn) -> tuple[list[int], list[float]]:
        """Encodes one message as the chat template writes it, with its loss weights."""
        body = self.encode(turn.content)
        tokens = [self.ids[turn.role], *body, self.ids["end"]]
        return tokens, [0.0, *([turn.weight] * (len(body) + 1))]

    def talk(self, talk: Talk, length: int) -> tuple[list[int], list[float]]:
        """Encodes a conversation, dropping the question turns that do not fit."""
        tokens, weights = [self.ids["begin"]], [0.0]
        for turn in talk.turns:
            ids, weight = self.turn(turn)
            tokens += ids
            weights += weight
        for question, answer in zip(talk.more[::2], talk.more[1::2], strict=True):
            ids, weight = self.turn(question)
            more, extra = self.turn(answer)
            if len(tokens) + len(ids) + len(more) > length + 1:
                break
            tokens += ids + more
            weights += weight + extra
        return tokens, weights

    def batch(self, seed: int, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns inputs, targets and target weights, each [rows, length]."""
        tokens = torch.full((rows, length + 1), self.ids["pad"])
        weights = torch.zeros(rows, length + 1)
        row, attempt = 0, 0
        while row < rows:
            ids, weight = self.talk(make_talk(seed * 65536 + attempt, length), length)
            attempt += 1
            if len(ids) > length + 1:
                continue
            tokens[row, : len(ids)] = torch.tensor(ids)
            weights[row, : len(ids)] = torch.tensor(weight)
            row += 1
        return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]
