"""Model folders with tokenizers in the files that came before tokenizer.json, one of each kind, and texts for them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from .tiny import CORPUS, TEXTS, byte_level, write

# Scripts, by ranges of code points that are mostly letters.
SCRIPTS = {
    "Latin": (0x61, 0x7A), "Latin-1": (0xC0, 0xFF), "Latin Extended": (0x100, 0x17F), "IPA": (0x250, 0x2AF),
    "Vietnamese": (0x1EA0, 0x1EF9), "Combining": (0x300, 0x36F), "Greek": (0x391, 0x3C9), "Polytonic": (0x1F00, 0x1FFC),
    "Cyrillic": (0x410, 0x44F), "Armenian": (0x531, 0x556), "Hebrew": (0x5D0, 0x5EA), "Arabic": (0x621, 0x64A),
    "Presentation forms": (0xFE70, 0xFEFC), "Syriac": (0x710, 0x72F), "Thaana": (0x780, 0x7A5), "NKo": (0x7CA, 0x7EA),
    "Devanagari": (0x904, 0x94D), "Bengali": (0x985, 0x9B9), "Gurmukhi": (0xA05, 0xA39), "Gujarati": (0xA85, 0xAB9),
    "Oriya": (0xB05, 0xB39), "Tamil": (0xB85, 0xBB9), "Telugu": (0xC05, 0xC39), "Kannada": (0xC85, 0xCB9),
    "Malayalam": (0xD05, 0xD39), "Sinhala": (0xD85, 0xDC6), "Thai": (0xE01, 0xE3A), "Lao": (0xE81, 0xEB0),
    "Tibetan": (0xF40, 0xF6C), "Myanmar": (0x1000, 0x102A), "Georgian": (0x10D0, 0x10F0), "Hangul": (0xAC00, 0xD7A3),
    "Jamo": (0x1100, 0x1175), "Ethiopic": (0x1200, 0x1248), "Cherokee": (0x13A0, 0x13F4), "Khmer": (0x1780, 0x17B3),
    "Mongolian": (0x1820, 0x1878), "Hiragana": (0x3041, 0x3096), "Katakana": (0x30A1, 0x30FA), "Han": (0x4E00, 0x9FFF),
    "Han B": (0x20000, 0x2A6D6), "Full width": (0xFF01, 0xFF5E), "Gothic": (0x10330, 0x1034A),
    "Mathematical": (0x1D400, 0x1D7FF), "Emoji": (0x1F600, 0x1F64F), "Pictographs": (0x1F300, 0x1F5FF),
    "Ligatures": (0xFB00, 0xFB06), "Punctuation": (0x2010, 0x2027), "Controls": (0x00, 0x1F), "C1": (0x7F, 0x9F),
    "Private": (0xE000, 0xE0FF), "ASCII marks": (0x21, 0x2F),
}  # fmt: skip
SPACES = [" "] * 8 + [
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\ufe0f",
    "\u0301",
    "",
]


def texts(count: int, seed: int = 0) -> list[str]:
    """Words of all scripts, mixed and not, with empty texts and very long ones among them."""
    rng = random.Random(seed)
    names = sorted(SCRIPTS)

    def word(script: str) -> str:
        first, last = SCRIPTS[script]
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))

    def text(words: int) -> str:
        own = rng.sample(names, rng.choice([1, 1, 2, 5]))
        known = " ".join(CORPUS[:4]).split()
        pieces = [rng.choice(known) if rng.random() < 0.4 else word(rng.choice(own)) for _ in range(words)]
        return "".join(piece + rng.choice(SPACES) for piece in pieces)

    made = [*TEXTS, "", " ", "\u0000", "word " * 4000, "x" * 3000]
    return made + [text(rng.randint(1, 12)) for _ in range(count - len(made))]


# What the tokenizers learn from: most characters of the texts are new to them.
LINES = [" ".join(text.split()) for text in texts(150, seed=1) if text.strip() and len(text) < 500] + CORPUS * 20


def _sentencepiece(path: Path, **options: Any) -> None:
    settings = {"vocab_size": 1500, "character_coverage": 0.99, "hard_vocab_limit": False, "minloglevel": 2}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, **(settings | options)
        )


def _byte_bpe(folder: Path, special: list[str], config: dict[str, Any], architecture: dict[str, Any]) -> None:
    write(folder, tokenizer_config_json=config, config_json=architecture)
    byte_level(special).model.save(str(folder))


def bert(folder: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    write(folder, tokenizer_config_json={"do_lower_case": True}, config_json={"model_type": "bert"})
    tokenizer.model.save(str(folder))


def bert_cased(folder: Path) -> None:
    bert(folder)
    config = {
        "do_lower_case": False,
        "strip_accents": True,
        "tokenize_chinese_chars": False,
        "tokenizer_class": "BertTokenizer",
        "do_basic_tokenize": True,
        "never_split": None,
        "model_max_length": 512,
        "special_tokens_map_file": None,
        "name_or_path": "/nowhere",
    }
    write(folder, tokenizer_config_json=config, added_tokens_json={"<new word>": 1500, "[NEW]": 1501})
    size = len((folder / "vocab.txt").read_text().splitlines())
    named = {"additional_special_tokens": ["[NEW]"], "mask_token": {"content": "[MASK]", "lstrip": True}}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    named["mask_token"] = flags | {"content": "[MASK]", "lstrip": True}
    write(folder, added_tokens_json={"<new word>": size, "[NEW]": size + 1}, special_tokens_map_json=named)


def gpt2(folder: Path) -> None:
    _byte_bpe(folder, ["<|endoftext|>"], {}, {"model_type": "gpt2"})


def roberta(folder: Path) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    _byte_bpe(folder, special, {"model_max_length": 512}, {"model_type": "roberta"})


def whisper(folder: Path) -> None:
    config = {"tokenizer_class": "WhisperTokenizer", "errors": "replace", "add_prefix_space": False}
    _byte_bpe(folder, ["<|endoftext|>"], config, {"model_type": "whisper"})
    size = len(json.loads((folder / "vocab.json").read_text()))
    markers = ["<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>"]
    markers += ["<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>"]
    write(
        folder,
        added_tokens_json={marker: size + i for i, marker in enumerate(markers)},
        special_tokens_map_json={"additional_special_tokens": ["<|endoftext|>", *markers]},
        normalizer_json={"colour": "color"},
    )


def _fairseq(folder: Path, kind: str, architecture: str, algorithm: str) -> None:
    write(folder, tokenizer_config_json={"tokenizer_class": kind}, config_json={"model_type": architecture})
    _sentencepiece(folder / "sentencepiece.bpe.model", model_type=algorithm)


def xlm_roberta(folder: Path) -> None:
    _fairseq(folder, "XLMRobertaTokenizer", "xlm-roberta", "unigram")


def mbart(folder: Path) -> None:
    _fairseq(folder, "MBartTokenizer", "mbart", "unigram")


def nllb(folder: Path) -> None:
    _fairseq(folder, "NllbTokenizer", "m2m_100", "bpe")
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model")).vocab_size()
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    languages = ["ace_Arab", "deu_Latn", "eng_Latn", "zho_Hans"]
    added = {size + 1 + i: flags | {"content": content} for i, content in enumerate([*languages, "<mask>"])}
    config = {"tokenizer_class": "NllbTokenizer", "additional_special_tokens": languages, "src_lang": "deu_Latn"}
    write(folder, tokenizer_config_json=config | {"added_tokens_decoder": added})


def t5(folder: Path) -> None:
    write(folder, config_json={"model_type": "t5"})
    _sentencepiece(folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def albert(folder: Path) -> None:
    write(folder, config_json={"model_type": "albert"})
    special = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}
    _sentencepiece(folder / "spiece.model", **special)


def deberta(folder: Path) -> None:
    config = {"do_lower_case": False, "vocab_type": "spm"}
    write(folder, tokenizer_config_json=config, config_json={"model_type": "deberta-v2"})
    pieces = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    _sentencepiece(folder / "spm.model", pad_id=0, bos_id=1, eos_id=2, unk_id=3, **pieces)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model")).vocab_size()
    write(folder, added_tokens_json={"[MASK]": size})


def marian(folder: Path) -> None:
    config = {"source_lang": "en", "target_lang": "de"}
    write(folder, tokenizer_config_json=config, config_json={"model_type": "marian"})
    pieces: dict[str, int] = {"</s>": 0, "<unk>": 1}
    for name in ("source.spm", "target.spm"):
        _sentencepiece(folder / name, vocab_size=1500 if name == "source.spm" else 1300)
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
        for i in range(3, len(model)):
            pieces.setdefault(model.IdToPiece(i), len(pieces))
    pieces[">>fra<<"] = len(pieces)
    pieces["<pad>"] = len(pieces)
    write(folder, vocab_json=pieces)


def byt5(folder: Path) -> None:
    write(folder, tokenizer_config_json={"tokenizer_class": "ByT5Tokenizer"}, config_json={"model_type": "t5"})


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bert": (bert, "BertTokenizer"),
    "bert_cased": (bert_cased, "BertTokenizer"),
    "gpt2": (gpt2, "GPT2Tokenizer"),
    "roberta": (roberta, "RobertaTokenizer"),
    "whisper": (whisper, "WhisperTokenizer"),
    "xlm_roberta": (xlm_roberta, "XLMRobertaTokenizer"),
    "mbart": (mbart, "MBartTokenizer"),
    "nllb": (nllb, "NllbTokenizer"),
    "t5": (t5, "T5Tokenizer"),
    "albert": (albert, "AlbertTokenizer"),
    "deberta": (deberta, "DebertaV2Tokenizer"),
    "marian": (marian, "MarianTokenizer"),
    "byt5": (byt5, "ByT5Tokenizer"),
}
