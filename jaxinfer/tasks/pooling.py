"""What models make of whole texts: input as users have it to rows of tokens, and numbers to outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from jaxinfer.checkpoint.sentence import SentenceModel
from jaxinfer.engine.feed import OnError
from jaxinfer.engine.outputs import PoolingRequestOutput
from jaxinfer.engine.pooling.load import LoadedPooling
from jaxinfer.engine.pooling.packing import Row
from jaxinfer.engine.pooling.reader import Reader
from jaxinfer.engine.prompts import BYTES
from jaxinfer.errors import ContextLengthError, RequestError, placed
from jaxinfer.sampling.ids import are_ids, is_id, token_ids
from jaxinfer.tasks.template import PairTemplate
from jaxinfer.text.encoding import Truncation

Text = str | Sequence[int] | Mapping[str, Any]  # ids are a whole input, with their special tokens
Pair = tuple[str | Sequence[int], str | Sequence[int]]
PoolingOut = TypeVar("PoolingOut", bound=PoolingRequestOutput[Any])


@dataclass(frozen=True)
class TextOptions:
    """How texts become tokens.

    prompt: what is put before them; None: nothing.
    skip: tokens of it that take no part in the pooling.
    most: tokens of a text; what is longer is cut, or with truncate=False refused.
    template: of pairs; None: they are as the tokenizer has pairs.
    """

    prompt: str | None
    skip: int
    most: int
    truncate: bool
    template: PairTemplate | None = None


class PoolingTask(ABC, Generic[PoolingOut]):
    """One kind of thing to ask of texts. pairs: two of them may be one input; of_tokens: there are numbers of each
    token."""

    pairs = False
    of_tokens = False
    done = "Encoded"

    def __init__(self, loaded: LoadedPooling):
        self.loaded, self.engine, self.tokenizer = loaded, loaded.engine, loaded.tokenizer
        self.said = loaded.sentence or loaded.pairs or SentenceModel(loaded.folder)
        pairs = loaded.pairs
        self._template: PairTemplate | None = None
        if pairs is not None and (pairs.conversation or pairs.original_qwen3):
            self._template = PairTemplate(self.tokenizer, "qwen3_reranker" if pairs.original_qwen3 else None)

    @abstractmethod
    def outputs(self, rows: list[Row], values: Any, options: Any) -> Iterator[PoolingOut]:
        """Of numbers f32[rows, N], or of a list of f32[tokens, N]."""

    @abstractmethod
    def failure(self, index: int, error: str) -> PoolingOut:
        """The output of a text that can't be served, where on_error is "return"."""

    def run(
        self, texts: Iterable[Any], text_options: TextOptions, options: Any, on_error: OnError
    ) -> Iterator[PoolingOut]:
        """Outputs in the order of the texts, as soon as those before are there."""
        if on_error not in ("raise", "return"):
            raise RequestError(f'on_error is {on_error!r}: it must be "raise" or "return"', "on_error")
        self.engine.check_open()
        return self._run(texts, text_options, options, on_error)

    def _run(
        self, texts: Iterable[Any], text_options: TextOptions, options: Any, on_error: OnError
    ) -> Iterator[PoolingOut]:
        done: dict[int, PoolingOut] = {}

        def row(index: int, text: Any) -> Row | None:
            try:
                return self.row(index, text, text_options)
            except ValueError as error:
                if on_error == "raise":
                    raise placed(f"text {index}", error) from None
                done[index] = self.failure(index, str(error))
                return None

        turn = 0
        for rows, values in self.engine.run(Reader(texts, row, self.engine.portion), self.of_tokens):
            done |= {output.index: output for output in self.outputs(rows, values, options)}
            while turn in done:
                yield done.pop(turn)
                turn += 1
        while turn in done:
            yield done.pop(turn)
            turn += 1

    def text_options(
        self,
        prompt: str | None = None,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        chat_template: str | None = None,
    ) -> TextOptions:
        """truncate_prompt_tokens: -1 is as many as a text may have. chat_template: of pairs. Raises RequestError."""
        most = self.loaded.max_model_len
        wanted = truncate_prompt_tokens
        if wanted is not None and (not is_id(wanted) or wanted == 0 or not -1 <= wanted <= most):
            raise RequestError.at("truncate_prompt_tokens", f"{wanted!r:.100} is neither -1 nor from 1 to {most}")
        if not isinstance(truncate, bool):
            raise RequestError.at("truncate", f"{truncate!r:.100} is neither true nor false")
        template = self._template if chat_template is None else PairTemplate(self.tokenizer, chat_template)
        sentence = self.loaded.sentence
        skip = self._prompt_tokens(prompt) if prompt and sentence and not sentence.include_prompt else 0
        most = most if wanted in (None, -1) else wanted
        return TextOptions(prompt, skip, most, truncate or wanted is not None, template)

    def prompt(self, name: str | None, text: str | None) -> str | None:
        """What is put before texts: `text`, or what the checkpoint has under this name, or what it has for all."""
        prompts = self.said.prompts or {}
        if text is not None:
            if not isinstance(text, str):
                raise RequestError.at("prompt", f"{text!r:.100} is no text")
            if name is not None:
                raise RequestError.at("prompt_name", f"{name!r:.100}: prompt is given too; leave one of them out")
            return text
        if name is not None and name not in prompts:
            there = f"there are {', '.join(prompts)}" if prompts else "it has none"
            raise RequestError.at(
                "prompt_name", f"{name!r:.100} is no prompt of the checkpoint: {there}; or give prompt"
            )
        name = self.said.default_prompt if name is None else name
        return None if name is None else prompts.get(name)

    def _prompt_tokens(self, prompt: str) -> int:
        """As sentence-transformers counts them: with the special tokens before, without the one after."""
        ids = self.tokenizer.encode(prompt)
        return len(ids) - (bool(ids) and ids[-1] in self.tokenizer.special_ids)

    def row(self, index: int, text: Any, options: TextOptions) -> Row:
        """A text, ids or a pair as the model gets it. Raises RequestError."""
        if isinstance(text, Mapping):
            text = _of_dict(text)
        limit = Truncation(options.most) if options.truncate else None
        types, sentence = None, self.loaded.sentence
        if isinstance(text, str):
            text = self._lowered(text if options.prompt is None else options.prompt + text)
            special = not (sentence and sentence.is_table)
            ids = self.tokenizer.encode(text, special)
            if limit is not None and len(ids) > options.most:
                ids = self.tokenizer.encoding(text, truncation=limit, add_special_tokens=special).ids
            if sentence and sentence.dropped is not None:
                ids = [i for i in ids if i != sentence.dropped]
        elif is_pair(text):
            ids, types = self._pair(text[0], text[1], options)
        else:
            ids = self._ids(text)[: options.most if options.truncate else None]
        if not ids:
            raise RequestError("the text is empty: the model's tokenizer puts nothing around it", "prompt")
        if len(ids) > options.most:
            raise ContextLengthError(
                f"the text has {len(ids)} tokens: it may have at most {options.most} (max_model_len); shorten it, or "
                "give truncate=True to cut it",
                "prompt",
            )
        return Row(index, ids, types, options.skip if isinstance(text, str) else 0)

    def _lowered(self, text: str) -> str:
        return text.lower() if self.said.lower_case else text

    def _pair(self, first: Any, second: Any, options: TextOptions) -> tuple[list[int], list[int] | None]:
        """Ids of both, and of which of the two each is."""
        if not self.pairs:
            raise RequestError("a pair of texts is given, and the model makes vectors of single ones", "prompt")
        if options.template is not None and isinstance(first, str) and isinstance(second, str):
            return options.template.ids(first, second, options.prompt, options.most if options.truncate else None), None
        if options.template is not None:
            raise RequestError("a pair by a chat template is one of strings, not of token ids", "prompt")
        first = (options.prompt or "") + first if isinstance(first, str) else first
        a, b = (self._lowered(part) if isinstance(part, str) else self._ids(part) for part in (first, second))
        encoding = self.tokenizer.encoding(a, b, Truncation(options.most) if options.truncate else None)
        return encoding.ids, encoding.type_ids

    def _ids(self, text: Any) -> list[int]:
        what = "a text, or a pair of two, must be strings or" if self.pairs else "a text must be a string or"
        if self.pairs and isinstance(text, tuple | list) and any(isinstance(part, str) for part in text):
            raise RequestError(f"a pair is a tuple of two texts, strings or token ids, and not {text!r:.80}", "prompt")
        if isinstance(text, BYTES):
            raise RequestError(f"{what} a list of token ids, not {type(text).__name__}: decode it", "prompt")
        ids, vocab = token_ids(text, what), self.engine.model.config.vocab_size
        for i in ids:
            if not 0 <= i < vocab:
                raise RequestError(f"the text has token id {i}: the model's ids go from 0 to {vocab - 1}", "prompt")
        return ids

    def list_of(self, texts: Any) -> list[Any]:
        """One text or a list of them, as a list."""
        single = isinstance(texts, str | Mapping) or (are_ids(texts) and len(texts) > 0)
        single = single or (self.pairs and is_pair(texts) and all(isinstance(part, str) for part in texts))
        if not single and (not isinstance(texts, Sequence | np.ndarray) or isinstance(texts, BYTES)):
            raise RequestError.at("prompts", f"a text or a list of them is needed, not {type(texts).__name__}")
        return [texts] if single else list(texts)


def is_pair(text: Any) -> bool:
    """Whether it is a tuple of two texts, as strings or ids."""
    return isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) or are_ids(part) for part in text)


def _of_dict(text: Mapping[str, Any]) -> Any:
    if set(text) not in ({"prompt"}, {"prompt_token_ids"}):
        raise RequestError(f"a text as a dict has either prompt or prompt_token_ids, not {list(text)}", "prompt")
    return text["prompt" if "prompt" in text else "prompt_token_ids"]


def progress(outputs: Iterator[PoolingOut], total: int, shown: bool, done: str) -> Iterator[PoolingOut]:
    """A bar on stderr."""
    if not shown:
        return outputs
    from tqdm import tqdm

    bar: Iterator[PoolingOut] = iter(tqdm(outputs, total=total, desc=done))
    return bar
