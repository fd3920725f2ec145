"""Small tokenizers of the kinds that checkpoints have, trained or written here."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

SPECIALS = ["<s>", "</s>", "<|user|>", "<|user|>x"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog barks 123 times",
    "héllo wörld, naïve café; 你好世界 你好 😀😀 👩‍👩‍👧 \n\n  indented\n\ttabs   spaces",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}<|assistant|>"
)


def byte_level() -> Tokenizer:
    """As GPT-2 and Llama 3: any byte sequence can come out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIALS)
    )
    tokenizer.add_tokens([AddedToken("two words", normalized=True)])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_fallback(strip: bool = True) -> Tokenizer:
    """As Llama 2: rare characters are <0xNN> tokens, a space is put before each piece."""
    tokens = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", *"abcdehlorw.", "\ufffd", "é", "\u2581h", "ll", "lo"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("\u2581", "h"), ("l", "l"), ("l", "o")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return tokenizer


def metaspace(scheme: str = "first") -> Tokenizer:
    """As T5: decoded by a class that the service knows nothing of."""
    tokens = ["<unk>", *SPECIALS, "\u2581", *"abcdehlorw.", "\u2581h", "ll", "lo"]
    merges = [("\u2581", "h"), ("l", "l"), ("l", "o")]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: spaces stand between tokens, and some are taken back."""
    tokens = ["[UNK]", *SPECIALS, "he", "##llo", "wor", "##ld", ".", ",", "a", "##b"]
    tokenizer = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """A checkpoint folder, as far as the tokenizer service reads one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    size = tokenizer.get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    return folder
