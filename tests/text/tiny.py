"""What the tiny tokenizers of these tests are made of."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Don't stop, it's 27 + 45 = 72!",
    "hello world, this is a test of (some) code:\n\n    def f(x):\n        return x\n",
    "user says hi [INST] What is this? [/INST] we've, they're, n't I'm ' quoted ' .",
    "é ü ñ 日本語 emoji 🙂 and Ελληνικά кириллица",
] * 10

TEXTS = [
    "hello world",
    " hello",
    "  two  spaces  ",
    "Don't stop, it's 27 + 45!",
    "é日本語🙂 new: 👩‍👩‍👧 ẞ \u200b",
    "line\n\n\tbreak\r\n",
    "x",
    "",
    " ",
    "[INST] hi [/INST]",
]


def write(folder: Path, **files: Any) -> Path:
    """Writes NAME_json=value as NAME.json into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name.removesuffix('_json')}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def sentencepiece_model(path: Path, **options: Any) -> None:
    settings = {
        "vocab_size": 340,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "character_coverage": 0.98,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, **(settings | options)
        )


def byte_level(special: list[str], split: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:  # as Llama 3 and Qwen do
        cut = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), behavior="isolated")
        inner = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, inner])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_like(folder: Path, model: Any, decoder: Any, cleans_up: bool = False) -> Path:
    """tokenizer.json as it is made of SentencePiece models."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": cleans_up}
    folder = write(folder, tokenizer_config_json=config, config_json={"model_type": "llama"})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def json_bpe_tokenizer(folder: Path, last: Any = None) -> Path:
    """Of a BPE model: byte fallback, Fuse, and at last a Strip, unless it is something else."""
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", "▁▁", "h", "e", "l", "o", "w", ".", "!", "'", "s", "he", "ll", "hell", "hello", "▁hello", "日", "é"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *byte_tokens, *words])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), last or decoders.Strip(" ", 1, 0)]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return sentencepiece_like(folder, model, decoders.Sequence(steps))
