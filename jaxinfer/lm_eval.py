"""jaxinfer as a model of lm-eval, EleutherAI's evaluation harness (`pip install '.[lm-eval]'`):

    jaxinfer lm-eval --model_args pretrained=FOLDER --tasks hellaswag --num_fewshot 5
    jaxinfer lm-eval --model_args config=configs/llama-3.1-8b_v6e-1.yaml --tasks hellaswag
    jaxinfer lm-eval --model_args pretrained=FOLDER --adapter sql=DIR --tasks hellaswag
    lm_eval.simple_evaluate(model=JaxInferLM("FOLDER"), tasks=["hellaswag"])

What is scored given which tokens, what is greedy and what is sampled, and where a text is cut, is as in its `hf`
model, so results are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from jaxinfer.engine.outputs import RequestOutput, ScoreOutput
from jaxinfer.engine.scoring import Pair, prefix_token_id, rolling_windows
from jaxinfer.llm import LLM
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sharding import local_devices

log = logging.getLogger(__name__)

LM_EVAL_DEVICE = "cuda:0"  # what lm-eval asks for where its user has not
MAX_GEN_TOKS = 256  # of a task that says nothing, as in lm-eval's `hf`
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "min_tokens")
NAMES = {"min_new_tokens": "min_tokens"}  # transformers' names of what is there under another one
NOTHING = {"num_beams": 1, "num_return_sequences": 1}  # what asks for nothing with this value


@register_model("jaxinfer")
class JaxInferLM(TemplateLM):  # type: ignore[misc]
    """Scores and generates for lm-eval.

    pretrained: an LLM, or a folder or hub id to load with the further options (those of LLM).
    config: a deployment's YAML file, which says what is not given.
    max_gen_toks: most tokens of an answer where a task does not say.
    batch_size: lm-eval always gives one; rows join and leave the batch as they come, so 1 (its default) and "auto"
        change nothing, and another number is max_num_seqs.
    device: JAX's, if any.
    adapter: that all prompts have: NAME=FOLDER, or the name of one of the model's `adapters`.

    Raises ValueError for options that LLM does not have.
    """

    def __init__(
        self,
        pretrained: LLM | str | None = None,
        *,
        config: str | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        adapter: str | None = None,
        **options: Any,
    ):
        super().__init__()
        platform = local_devices()[0].platform
        if device not in (None, LM_EVAL_DEVICE) and device != platform:
            raise ValueError(f"device is {device!r}: JAX has chosen {platform}; leave it out, or set JAX_PLATFORMS")
        rows = max_batch_size or (None if str(batch_size or 1) in ("1", "auto") else int(str(batch_size)))
        if rows is not None:
            options["max_num_seqs"] = rows
        self.adapter, _, folder = (adapter or "").partition("=")
        if folder:
            options["adapters"] = {self.adapter: folder}
        if isinstance(pretrained, LLM):
            if config is not None or options:
                what = "config" if config is not None else next(iter(options))
                raise ValueError(f"{what} is an option of loading, and the model is loaded already")
            self.llm = pretrained
        elif config is not None:
            self.llm = LLM.from_config(config, model=pretrained, **options)
        elif pretrained is not None:
            self.llm = LLM(pretrained, **options)
        else:
            raise ValueError("model_args: give pretrained=FOLDER or config=FILE")
        self.llm.engine.check_adapter(self.adapter or None)  # what is wrong with it is said now
        self.max_gen_toks = max_gen_toks
        self._template: str | None = None  # the name of the chat template, if it was chosen

    @property
    def max_length(self) -> int:
        """Most tokens that the model sees."""
        return self.llm.sizes.max_model_len

    @property
    def eot_token_id(self) -> int:
        eos = self.llm.tokenizer.eos_token_id
        return self.prefix_token_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        return prefix_token_id(self.llm.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the chat template, for lm-eval's record of the run; one that is named is used from now on.
        Raises ValueError if the checkpoint has none of this name."""
        if not chat_template:
            return None
        templates = self.llm.tokenizer.chat_templates.templates
        if isinstance(chat_template, str):
            if chat_template not in templates:
                names = ", ".join(sorted(templates)) or "none"
                raise ValueError(f"chat_template is {chat_template!r}: the checkpoint has {names}")
            self._template = chat_template
        return templates.get(self._template or "default")

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Without add_generation_prompt it ends inside its last message, to be continued.

        A template that refuses the conversation gets it without its system messages: some templates have none."""
        without = [message for message in chat_history if message["role"] != "system"]
        try:
            return self._prompt(chat_history, add_generation_prompt)
        except ValueError as error:
            if not without or len(without) == len(chat_history):
                raise
            text = self._prompt(without, add_generation_prompt)
            log.warning("%s: so the system message is left out", error)
            return text

    def _prompt(self, messages: Sequence[Mapping[str, str]], answer: bool) -> str:
        tokenizer = self.llm.tokenizer
        return tokenizer.chat_prompt(messages, None, answer, self._template, continue_final_message=not answer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None
    ) -> list[int]:
        """Ids, at most the last `left_truncate_len`; as the tokenizer puts special tokens, unless the text has its BOS
        already."""
        tokenizer = self.llm.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, tokenizer.decode([self.prefix_token_id], False))
        return tokenizer.encode(string, add_special_tokens)[-(left_truncate_len or 0) :]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = [(context[-(self.max_length + 1 - len(scored)) :], scored) for _, context, scored in requests]
        outputs = self.llm.score(
            [context for context, _ in pairs],
            [scored for _, scored in pairs],
            adapter=self.adapter or None,
            use_tqdm=not disable_tqdm,
        )
        _check(outputs)
        answers = [(output.logprob, output.is_greedy) for output in outputs]
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of max_length."""
        windows: list[list[Pair]] = [
            list(rolling_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length))
            for request in requests
        ]
        parts = iter(self._loglikelihood_tokens([(None, *pair) for text in windows for pair in text], disable_tqdm))
        answers = [sum(next(parts)[0] for _ in text) for text in windows]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to a stop string, EOS, or as many tokens as its task allows."""
        tokenizer = self.llm.tokenizer
        prompts, params, stops = [], [], []
        for context, kwargs in (request.args for request in requests):
            asked, stop = self._sampling(kwargs)
            assert asked.max_tokens is not None
            ids = self.tok_encode(context, left_truncate_len=self.max_length - asked.max_tokens)
            prompts.append(ids or [self.prefix_token_id])
            params.append(asked)
            stops.append(stop)
        outputs = self.llm.generate(prompts, params, adapter=self.adapter or None, use_tqdm=not disable_tqdm)
        _check(outputs)
        # As lm-eval's `hf` does, not as what continues the context: a space at the start is not part of the answer.
        texts = [
            postprocess_generated_text(tokenizer.decode(output.outputs[0].token_ids), stop, None)
            for output, stop in zip(outputs, stops, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sampling(self, kwargs: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
        """The parameters of a task's generation_kwargs, and its stop strings. What they leave open is as the
        checkpoint's generation_config.json says, but for the temperature: without one a task is greedy."""
        known = {NAMES.get(name, name): value for name, value in kwargs.items() if value is not None}
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(known, self.max_gen_toks))
        new, until = wanted.pop("max_gen_toks"), wanted.pop("until")
        del wanted["do_sample"]
        wanted = {name: value for name, value in wanted.items() if (name, value) not in NOTHING.items()}
        if unknown := sorted(wanted.keys() - set(SAMPLING)):
            raise ValueError(f"generation_kwargs: {unknown[0]} is not supported; there are {', '.join(SAMPLING)}")
        if new >= self.max_length:
            raise ValueError(f"generation_kwargs: max_gen_toks is {new}, and max_model_len is {self.max_length}")
        eos = self.llm.tokenizer.decode([self.eot_token_id], False)
        stop = [string for string in handle_stop_sequences(until, eos) if string]
        # Stop strings can be special tokens, which the text without them would not show.
        fixed = {"max_tokens": new, "stop": stop, "skip_special_tokens": False}
        params = self.llm.get_default_sampling_params()
        return params.with_changes(**{"temperature": 0.0} | wanted | fixed), stop


def _check(outputs: Sequence[RequestOutput | ScoreOutput]) -> None:
    """A model that computes no numbers has no place in a table of results. Raises ValueError."""
    for output in outputs:
        if output.error is not None:
            raise ValueError(f"request {output.index}: {output.error}")
