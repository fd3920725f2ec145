"""Trains the tokenizer of the bundled model: byte-level BPE, so every text can be encoded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from corpus import PROSE_WORDS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from kvmesh.integration import needle

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 1088
# A space joins lower-case words only: a name or a number is then spelled by the same tokens
# after a space as at the beginning of an answer.
PATTERN = r"\p{N}{1,2}| ?[a-z]+|[A-Z][a-z]*|\p{L}+| ?[^\s\p{L}\p{N}]+|\s"
# Words outside the corpus that fill the vocabulary to a round size.
COMMON_WORDS = (
    "and not with from are was have will there their been world people time first because then "
    "when where"
)
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def weighted_lines() -> list[str]:
    """Lists words as often as they should count, so that syllables become tokens first."""
    heads = [head[:2] for head in needle.HEADS]
    lines = [*needle.OPEN_SYLLABLES, *heads] * 400
    lines += [*needle.HEADS] * 200
    lines += [f"{a}{b}" for a in range(10) for b in range(10)] * 300
    words = [word for word in PROSE_WORDS if word.islower()]
    lines += [" " + word for word in words] * 100
    lines += [word for word in PROSE_WORDS if not word.islower()] * 100
    lines += [" " + word for word in COMMON_WORDS.split()] * 20
    return lines


def train() -> Tokenizer:
    """Trains the tokenizer from the weighted word list."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(weighted_lines(), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json with the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    save(train(), parser.parse_args().folder)
