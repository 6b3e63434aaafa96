"""The loop: schedule a call, give it to the device, take in the tokens of the call before it meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxinfer.engine.constraints import fill_masks, forced_tokens
from jaxinfer.engine.generation import RequestGroup, SequenceOutput
from jaxinfer.engine.guided.guides import Guides
from jaxinfer.engine.host_adapters import HostAdapters
from jaxinfer.engine.request import FinishReason, Request
from jaxinfer.engine.request_methods import RequestMethods
from jaxinfer.engine.runner import PendingStep, Runner
from jaxinfer.engine.scheduler import SchedulerOutput
from jaxinfer.engine.scoring import Scoring
from jaxinfer.engine.shards import DataParallelScheduler
from jaxinfer.engine.stats import EngineStats
from jaxinfer.engine.table_blocks import place_of
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sampling.slots import Masks, TokenCounts
from jaxinfer.text.base import Tokenizer

STOP_STRING_STEPS = 8  # rows with stop strings are looked at on the host this often: what comes after one is wasted


class Call(NamedTuple):
    """A call that the device has and the host has not taken in yet.

    schedules: one for each shard of rows.
    launched: what to wait for.
    start: when it was launched, by time.perf_counter.
    compiled: Runner.compile_seconds then.
    """

    schedules: list[SchedulerOutput]
    launched: PendingStep
    start: float
    compiled: float


class Engine(RequestMethods):
    """Requests in, generations out. One thread at a time may use it (see EngineThread), but for what says otherwise."""

    def __init__(
        self,
        runner: Runner,
        scheduler: DataParallelScheduler,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        seed: int,
        max_host_adapters: int | None = None,
    ):
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_model_len = max_model_len
        self.guides = Guides(tokenizer, self.vocab_size, self.eos_token_ids)
        self.adapters = HostAdapters(self.read_adapter, max_host_adapters)
        self._stats = EngineStats()
        self.adapter_tokens = {}
        self._seed = seed
        self._next_id = 0
        self._id_lock = threading.Lock()
        self._generations: dict[int, SequenceOutput | Scoring] = {}
        self._followers: dict[int, list[Request]] = {}  # of a prompt's first continuation: those that wait for it
        self._in_flight: deque[Call] = deque()
        self._arrived = 0.0  # when the last call's tokens did
        self._broken_off = False

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        adapted = [g.request for g in list(self._generations.values()) if g.request.adapter is not None]
        return dataclasses.replace(
            self._stats,
            running=len(self.scheduler.running),
            waiting=self.scheduler.waiting_count + sum(map(len, list(self._followers.values()))),
            pages_used=self.scheduler.pages_used,
            pages_total=self.scheduler.pages_total,
            prefix_caching=self.scheduler.prefix_caching,
            snapshots_used=self.scheduler.snapshots_used,
            snapshots_total=self.scheduler.snapshots_total,
            max_adapters=self.scheduler.adapters.count,
            adapter_loads=self.scheduler.adapters.loads,
            adapter_reads=self.adapters.reads,
            running_adapters=Counter(request.adapter_name for request in adapted if request.slot >= 0),
            waiting_adapters=Counter(request.adapter_name for request in adapted if request.slot < 0),
            adapter_tokens=dict(self.adapter_tokens),
            table_loads=sum(tables.loads for tables in self.scheduler.tables),
        )

    @property
    def idle(self) -> bool:
        """Whether nothing is asked for any more."""
        return not self._generations

    def queue(self, group: RequestGroup | Scoring) -> None:
        """Takes a new request."""
        first, *others = (member.request for member in group.members)
        with self._whole():
            self.scheduler.add(first)
            for member in group.members:
                self._generations[member.request.id] = member
            if others and self.scheduler.prefix_caching:
                # The others find the prompt's pages in the prefix cache once the first one has computed them.
                self._followers[first.id] = others
            else:
                for other in others:
                    self.scheduler.add(other)

    def add(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, prompt: str | None = None, priority: int = 0
    ) -> RequestGroup:
        """`new_group`, queued."""
        group = self.new_group(prompt_token_ids, params, prompt, priority)
        self.queue(group)
        return group

    def step(self, seconds: float | None = None) -> list[SequenceOutput | Scoring]:
        """Gives the device its next call and takes in the tokens of the one before; returns the generations that got
        some. seconds: that a decoding call should take, about: the nearest number of steps."""
        with self._whole():
            return self._step(seconds)

    def abort(self, group: RequestGroup | Scoring) -> None:
        """Ends a prompt's continuations, wherever they are; nothing of them stays behind."""
        with self._whole():
            for generation in group.members:
                if generation.request.id in self._generations:
                    generation.end("abort")
                    self._stats.aborted += 1
                    self._forget(generation.request)

    def drop_all(self, reason: FinishReason = "error") -> None:
        """Ends everything, after an error that has broken off a step, say: the next request begins anew."""
        for generation in self._generations.values():
            generation.end(reason)
        self._generations.clear()
        self._followers.clear()
        self._in_flight.clear()
        self.scheduler.restart([])
        self._broken_off = True

    def close(self) -> None:
        """Frees the device's memory."""
        self._in_flight.clear()
        self.runner.close()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """What runs inside is done as a whole. What an error leaves that broke the last such thing off, anywhere, can't
        be trusted, and everything begins anew."""
        if self._broken_off:
            self.drop_all()
            self.runner.recover()
        self._broken_off = True
        yield
        self._broken_off = False

    def _step(self, seconds: float | None) -> list[SequenceOutput | Scoring]:
        # Preempting needs all tokens to be known.
        schedules = self.scheduler.schedule(self._max_steps(seconds), not self._in_flight)
        if any(schedule.requests for schedule in schedules):
            for slot, adapter in self.scheduler.adapters.coming():
                self.runner.load_adapter(slot, adapter)
            for shard, tables in enumerate(self.scheduler.tables):
                for block, value in tables.coming():
                    self.runner.load_table(shard, block, value)
            self._prepare_slots(schedules)
            self._in_flight.append(self._launch(schedules))
            if len(self._in_flight) == 1:
                return self._sample(self._in_flight[0])  # the next one is scheduled while this one runs
        touched = self._take_in(self._in_flight.popleft()) if self._in_flight else []
        for call in list(self._in_flight):  # all tokens before it are known now
            touched += self._sample(call)
        return touched

    def _launch(self, schedules: list[SchedulerOutput]) -> Call:
        launched = self.runner.launch(schedules)
        return Call(schedules, launched, time.perf_counter(), self.runner.compile_seconds)

    def _sample(self, call: Call) -> list[SequenceOutput | Scoring]:
        """Launches what the call samples, if that had to wait for the tokens before it. Gives the generations that got
        tokens without: those that a grammar leaves no choice for are like the next chunk of a prompt."""
        step = call.launched
        if step.held is None:
            return []
        masks = self.runner.all_allowed(step)
        size = len(masks) // len(call.schedules)  # of each shard
        rows = [
            (request, shard * size + row)
            for shard, schedule in enumerate(call.schedules)
            for row, request in enumerate(schedule.requests)
            if request.constrained and schedule.samples[row] and request.id in self._generations
        ]
        fill_masks(self.guides, rows, masks)
        room = self.runner.buckets.tokens[0] - len(self.scheduler.running) if self.runner.on_cpu else None
        forced = {row: (request, tokens) for request, row in rows if (tokens := forced_tokens(request, room))}
        self.runner.sample(step, masks, list(forced))
        touched: list[SequenceOutput | Scoring] = []
        for request, tokens in forced.values():
            generation = self._generations[request.id]
            assert isinstance(generation, SequenceOutput)
            generation.accept(tokens)
            request.length, request.decoding = len(request.tokens), False
            touched.append(generation)
            self._taken(generation)
        return touched

    def _max_steps(self, seconds: float | None) -> int:
        if any(request.constrained for request in self.scheduler.running):
            return 1
        steps = self.runner.max_steps
        if any(request.params.stop_strings for request in self.scheduler.running):
            steps = min(steps, STOP_STRING_STEPS)
        if seconds is not None:
            step_seconds = self._stats.step_seconds
            steps = min(steps, round(seconds / step_seconds) if step_seconds else 1)
        return max(steps, 1)

    def _prepare_slots(self, schedules: list[SchedulerOutput]) -> None:
        places: list[tuple[Request, int]] = []
        for request in (request for schedule in schedules for request in schedule.requests):
            params = request.params
            excluded = request.exclusions
            if params.has_penalties and not request.prepared:
                counts = TokenCounts.of(self.vocab_size, request.prompt_token_ids, request.output_token_ids)
                self.runner.prepare(request, counts)
            if params.has_masks and not request.prepared:
                always = excluded.always if excluded is not None else ()
                not_first = params.begin_suppress_tokens or ()
                masks = Masks.of(self.vocab_size, params.allowed_token_ids, always, params.logit_bias, not_first)
                self.runner.prepare(request, masks)
            if request.table is not None and request.guide is not None and not request.prepared:
                places.append((request, place_of(request.guide.state, request.table)))
            request.prepared = True
        if places:
            self.runner.prepare_places(places)

    def _take_in(self, call: Call) -> list[SequenceOutput | Scoring]:
        result = call.launched.wait()
        now = time.perf_counter()
        # The next call may have been compiled while this one's tokens lay waiting.
        seconds = now - max(call.start, self._arrived) - (self.runner.compile_seconds - call.compiled)
        self._arrived = now
        touched: list[SequenceOutput | Scoring] = []
        rows = len(result.count) // len(call.schedules)  # of each shard
        scheduled = [(i * rows + row, r) for i, s in enumerate(call.schedules) for row, r in enumerate(s.requests)]
        for row, request in scheduled:
            generation = self._generations.get(request.id)
            if generation is None:
                continue  # ended while the call was on its way
            span = result.spans.get(request.id)
            if span is not None and result.scored is not None:
                generation.accept_scored(result.scored, *span)
            count = int(result.count[row])
            if count:
                assert isinstance(generation, SequenceOutput)
                generation.accept(result.tokens[:count, row].tolist(), result.logprobs, row)
                if request.table is not None:
                    self._stats.table_tokens += count
                    if not generation.finished and request.tail:
                        generation.accept(request.tail)
            elif not generation.finished:
                continue  # an inner chunk of a prompt
            touched.append(generation)
            if request.slot >= 0:
                self.scheduler.publish(request, len(request.tokens) - 1)
            self._taken(generation)
        self._count(call.schedules, int(result.count.sum()), int(result.count.max()), seconds)
        return touched

    def _taken(self, generation: SequenceOutput | Scoring) -> None:
        """After some tokens of it: its prompt is computed, and it may have ended."""
        for follower in self._followers.pop(generation.request.id, ()):
            self.scheduler.add(follower)
        if generation.finished:
            self._stats.finished += 1
            self._forget(generation.request)

    def _count(self, schedules: list[SchedulerOutput], sampled: int, steps: int, seconds: float) -> None:
        stats = self._stats
        stats.calls += 1
        if any(schedule.chunks for schedule in schedules):
            stats.prefill_tokens += sum(sum(schedule.counts) for schedule in schedules)
            stats.prefill_seconds += seconds
        else:
            stats.decode_tokens += sampled
            stats.decode_seconds += seconds
            if steps:
                stats.step_seconds = seconds / steps

    def _forget(self, request: Request) -> None:
        stats = self._stats
        stats.preemptions += request.preemptions
        stats.queried_tokens += request.prompt_length
        stats.hit_tokens += request.hits
        stats.stateless_tokens += request.stateless
        if (name := request.adapter_name) in self.adapters.infos:
            self.adapter_tokens[name] = self.adapter_tokens.get(name, 0) + len(request.output_token_ids)
        self.scheduler.finish(request)
        # A first continuation that ends before its prompt was computed takes nobody with it.
        for follower in self._followers.pop(request.id, ()):
            self.scheduler.add(follower)
        del self._generations[request.id]
        if not self._generations:
            self._in_flight.clear()  # rows that have ended: nobody waits for them, and their time is not to be counted
