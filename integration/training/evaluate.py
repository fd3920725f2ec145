"""Measures exact greedy answers of an exported model on evaluation documents."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from model import Mini, MiniConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer
from train_mini import DEFAULT_TOKENIZER

from kvmesh.integration import needle


class Judge:
    """An exported model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = Mini(MiniConfig()).eval()
        weights = load_file(folder / "model.safetensors")
        self.model.load_state_dict({name: value.float() for name, value in weights.items()})

    def count(self, text: str) -> int:
        """Counts the tokens of a text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def set_coded(self, coded: bool) -> None:
        """Chooses whether past K/V are read from four-bit codes."""
        for layer in self.model.model.layers:
            layer.self_attn.coded = coded

    @torch.no_grad()
    def right(self, case: needle.NeedleCase) -> bool:
        """Tells whether greedy decoding gives exactly the answer and then stops.

        Greedy output equals the answer exactly when, with the answer given, each of its tokens
        and the end token is the likeliest next one; so one pass decides.
        """
        prompt = f"<|begin|><|user|>{case.prompt}<|end|><|assistant|>"
        start = len(self.tokenizer.encode(prompt).ids)
        ids = torch.tensor(self.tokenizer.encode(f"{prompt}{case.answer}<|end|>").ids)
        hidden = self.model.hidden(ids[None, :-1])[0, start - 1 :]
        return bool((self.model.logits(hidden).argmax(-1) == ids[start:]).all())

    def score(self, tokens: int, cases: int, first_seed: int) -> dict[str, float]:
        """Returns the share of right answers for each number of facts, and overall."""
        right: dict[int, list[bool]] = {}
        for index in range(cases):
            facts = index % needle.MAX_FACTS + 1
            case = needle.make_case(first_seed + index, tokens, facts, self.count)
            right.setdefault(facts, []).append(self.right(case))
        flat = [value for values in right.values() for value in values]
        by_facts = {str(facts): sum(values) / len(values) for facts, values in right.items()}
        return {"all": sum(flat) / len(flat), **by_facts}


def record(folder: Path, figures: list[dict[str, object]]) -> None:
    """Puts figures into training.json, in place of those of the same length and K/V form."""
    file = folder / "training.json"
    content = json.loads(file.read_text())
    fresh = {(figure["tokens"], figure["kv"]) for figure in figures}
    kept = [old for old in content["figures"] if (old["tokens"], old["kv"]) not in fresh]
    content["figures"] = sorted([*kept, *figures], key=lambda f: (f["tokens"], f["kv"] == "4bit"))
    file.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Prints one JSON line for each length and K/V form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_TOKENIZER)
    parser.add_argument("--lengths", default="256,512,1024")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kv", default="exact,4bit")
    parser.add_argument("--record", action="store_true", help="write into training.json")
    args = parser.parse_args()
    judge, figures = Judge(args.folder), []
    for length in (int(text) for text in args.lengths.split(",")):
        for kv in args.kv.split(","):
            judge.set_coded(kv == "4bit")
            score = judge.score(length, args.cases, args.first_seed)
            kind = {"tokens": length, "kv": kv, "cases": args.cases, "first_seed": args.first_seed}
            figures.append({**kind, **{name: round(value, 4) for name, value in score.items()}})
            print(json.dumps(figures[-1]), flush=True)
    if args.record:
        record(args.folder, figures)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
