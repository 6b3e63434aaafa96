"""Tiny tokenizers, trained here once a session, in the layouts that checkpoints come in."""

from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, processors

from .tiny import byte_level, json_bpe_tokenizer, sentencepiece_like, sentencepiece_model, write


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="session")
def llama3(root: Path) -> Path:
    """Byte-level BPE with a BOS template, chat markers, and truncation and padding left behind by a trainer."""
    tokenizer = byte_level(["<|begin|>", "<|end|>", "<|pad|>"], split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("née x", normalized=False)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=16, pad_id=2, pad_token="<|pad|>")
    folder = write(
        root / "llama3",
        tokenizer_config_json={
            "bos_token": {"content": "<|begin|>", "lstrip": False, "normalized": False, "__type": "AddedToken"},
            "eos_token": "<|end|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": True,
        },
        config_json={"model_type": "llama"},
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def gpt2(root: Path) -> Path:
    """vocab.json and merges.txt and nothing else, as GPT-2 came."""
    folder = write(root / "gpt2", config_json={"model_type": "gpt2"})
    byte_level(["<|endoftext|>"]).model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def sp_bpe(root: Path) -> Path:
    """A Llama-like tokenizer.model and no other file."""
    folder = write(root / "sp_bpe")
    sentencepiece_model(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def sp_unigram(root: Path) -> Path:
    """A unigram model as SentencePiece trains it by default: NFKC, extra spaces removed."""
    folder = write(root / "sp_unigram")
    sentencepiece_model(
        folder / "tokenizer.model",
        model_type="unigram",
        byte_fallback=False,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
        vocab_size=150,
    )
    return folder


@pytest.fixture(scope="session")
def sp_chat(root: Path, sp_bpe: Path) -> Path:
    """tokenizer.model with tokenizer_config.json: added tokens outside its vocabulary."""
    size = len(sentencepiece.SentencePieceProcessor(model_file=str(sp_bpe / "tokenizer.model")))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        0: {"content": "<unk>", "special": True},
        1: {"content": "<s>", "special": True},
        2: {"content": "</s>", "special": True},
        size: {"content": "<|im_start|>", "special": True},
        size + 1: {"content": "<|im_end|>", "special": True},
        size + 2: {"content": "<tool>", "special": False},
    }
    folder = write(
        root / "sp_chat",
        tokenizer_config_json={
            "added_tokens_decoder": {str(i): plain | token for i, token in added.items()},
            "add_bos_token": True,
            "add_eos_token": True,
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "legacy": False,
            "tokenizer_class": "LlamaTokenizer",
        },
        config_json={"model_type": "llama"},
    )
    (folder / "tokenizer.model").write_bytes((sp_bpe / "tokenizer.model").read_bytes())
    return folder


@pytest.fixture(scope="session")
def json_bpe(root: Path) -> Path:
    """tokenizer.json of a converted SentencePiece BPE: byte fallback, Fuse, Strip."""
    return json_bpe_tokenizer(root / "json_bpe")


@pytest.fixture(scope="session")
def json_at_start(root: Path) -> Path:
    """The same with a regular expression that takes the first space away, but leaves two."""
    return json_bpe_tokenizer(root / "json_at_start", decoders.Replace(Regex(r"\A (?! )"), ""))


@pytest.fixture(scope="session")
def json_anywhere(root: Path) -> Path:
    """The same with one that might change any part of the text."""
    return json_bpe_tokenizer(root / "json_anywhere", decoders.Replace(Regex("^ "), ""))


UNIGRAM = ["<unk>", "<s>", "</s>", "▁", ".", "?", "!", ",", "'", "n't", "▁'", "s", "m", "ve", "re", "n", "t", "▁n", "a"]


@pytest.fixture(scope="session")
def json_unigram(root: Path) -> Path:
    """tokenizer.json of a unigram model whose checkpoint asks for the clean-up of spaces."""
    vocab = [(token, -float(i)) for i, token in enumerate([*UNIGRAM, "▁a", "é"])]
    return sentencepiece_like(root / "json_unigram", models.Unigram(vocab, 0), decoders.Metaspace(), cleans_up=True)


@pytest.fixture(scope="session")
def wordpiece(root: Path) -> Path:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, ".": 3, "n't": 4, "é": 5}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]"])
    folder = write(root / "wordpiece", tokenizer_config_json={"clean_up_tokenization_spaces": True})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def looks_ahead(root: Path) -> Path:
    """A decoder that needs the last token to be known: </w> is a space except at the end."""
    tokenizer = Tokenizer(models.BPE({"a</w>": 0, "b": 1, "c</w>": 2}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    folder = write(root / "looks_ahead")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def no_decoder(root: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    folder = write(root / "no_decoder")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
