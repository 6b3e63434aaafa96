"""The loop: schedule, run, take the tokens in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.engine.generation import Generation
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.sampling.params import MAX_STOP_IDS, SamplingParams
from jaxinfer.text.tokenizer import Tokenizer

STOP_STRING_STEPS = 8  # rows with stop strings are looked at on the host this often: what comes after one is wasted


@dataclass
class EngineStats:
    """Tokens and seconds of device calls, without compilation. A mixed call's decoding rows count as prefill."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    preemptions: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Engine:
    """Requests in, generations out. One thread at a time may use it."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        seed: int,
    ):
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_model_len = max_model_len
        self.stats = EngineStats()
        self._seed = seed
        self._next_id = 0
        self._generations: dict[int, Generation] = {}
        self._step_seconds = 0.0  # of one decoding step, lately
        self._in_step = False

    def add(self, prompt_token_ids: Sequence[int], params: SamplingParams, prompt: str | None = None) -> Generation:
        """Queues a request. Raises ValueError for ids, a length or stop ids that can't be served."""
        length = len(prompt_token_ids)
        vocab = self.runner.model.config.vocab_size
        if not length:
            raise ValueError("the prompt is empty: give at least one token")
        for i in prompt_token_ids:
            if not 0 <= i < vocab:
                raise ValueError(f"the prompt has token id {i}: the model's ids go from 0 to {vocab - 1}")
        if length >= self.max_model_len:
            raise ValueError(
                f"the prompt has {length} tokens: with max_model_len {self.max_model_len} it may have at most "
                f"{self.max_model_len - 1}; shorten it or raise max_model_len"
            )
        stop_ids = tuple(
            dict.fromkeys([*(() if params.ignore_eos else self.eos_token_ids), *(params.stop_token_ids or ())])
        )
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"stop_token_ids {list(params.stop_token_ids or ())} and the checkpoint's EOS ids are {len(stop_ids)} "
                f"ids: at most {MAX_STOP_IDS} are supported; use stop strings for the rest"
            )
        limit = self.max_model_len if params.max_tokens is None else length + params.max_tokens
        request = Request(
            id=self._next_id,
            prompt_length=length,
            tokens=list(prompt_token_ids),
            params=params,
            # Unseeded requests of one LLM differ from each other and are the same in the next run of the program.
            seed=params.seed if params.seed is not None else (self._seed << 32) + self._next_id,
            stop_ids=stop_ids,
            limit=min(limit, self.max_model_len),
        )
        generation = Generation(request, prompt, self.tokenizer)
        self._next_id += 1
        self.scheduler.add(request)  # next to the line below: Ctrl-C between them would leave a row that nobody knows
        self._generations[request.id] = generation
        return generation

    def step(self, max_seconds: float | None = None) -> list[Generation]:
        """One device call; returns the generations that got tokens. `max_seconds` bounds a decoding call, roughly."""
        if self._in_step:  # Ctrl-C (in a notebook, say) broke the last one off, anywhere: what it left can't be trusted
            self.runner.recover()
            self.scheduler.restart([generation.request for generation in self._generations.values()])
        self._in_step = True
        touched = self._step(max_seconds)
        self._in_step = False
        return touched

    def _step(self, max_seconds: float | None) -> list[Generation]:
        steps = self.runner.max_steps
        if any(request.params.stop_strings for request in self.scheduler.running):
            steps = min(steps, STOP_STRING_STEPS)
        if max_seconds is not None:
            steps = min(steps, int(max_seconds / self._step_seconds) if self._step_seconds else 1)
        schedule = self.scheduler.schedule(max(steps, 1))
        if not schedule.requests:
            return []
        compiled = self.runner.compile_seconds
        start = time.perf_counter()
        rows = self.runner.run(schedule)
        seconds = time.perf_counter() - start - (self.runner.compile_seconds - compiled)
        chunks = [1] * len(schedule.decode) + [count for _, count in schedule.chunks]
        touched = []
        for row, (request, count) in enumerate(zip(schedule.requests, chunks, strict=True)):
            tokens = rows.tokens[: rows.count[row], row].tolist()
            request.computed += count if schedule.chunks else len(tokens)
            if request.pending > 0:
                continue  # an inner chunk of a prompt: what was sampled means nothing
            generation = self._generations[request.id]
            generation.accept(tokens, rows.logprobs, row)
            touched.append(generation)
            if request.finish_reason is not None:
                self._forget(request)
        self._count(schedule.chunks != [], sum(chunks), rows.count.sum().item(), seconds)
        if not schedule.chunks:
            self._step_seconds = seconds / max(rows.count.max().item(), 1)
        return touched

    def abort(self, generation: Generation) -> None:
        """Ends a request, wherever it is; nothing of it stays behind."""
        if generation.request.id in self._generations:
            generation.end("abort")
            self._forget(generation.request)

    def _forget(self, request: Request) -> None:
        self.stats.preemptions += request.preemptions
        self.scheduler.finish(request)
        del self._generations[request.id]

    def _count(self, mixed: bool, fed: int, sampled: int, seconds: float) -> None:
        if mixed:
            self.stats.prefill_tokens += fed
            self.stats.prefill_seconds += seconds
        else:
            self.stats.decode_tokens += sampled
            self.stats.decode_seconds += seconds
