"""Continuous batching: requests join and leave a running batch between its steps.

The batch has a fixed number of slots, its rows. Each step of the scheduler

1. frees the slots of requests that were cancelled or are past their deadline;
2. prefills waiting requests in the order of their arrival, one at a time with all of its samples,
   in chunks: at most `Engine.max_chunk` tokens a step, padding included, where each sequence that
   joins the batch counts as `MIN_CHUNK` tokens besides its chunks;
3. decodes one token for every running sequence, or `decode_steps` if no prompt is left to prefill
   into a free slot, and no sequence follows a grammar, whose next mask depends on the token before;
4. delivers what the step before has sampled, while the device computes this one; of sequences that
   follow a grammar before 3.

So whoever is being answered waits for that many prompt tokens between two of its own at most,
however long the prompts of others are. A prompt is prefilled alone and in the same chunks whenever
it comes, and a row of the batch does not depend on the others: the tokens of a request are those
of the same request alone.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.batch_state import (
    ChunkScores,
    PaddedChunk,
    Prefilled,
    Request,
    SampledTokens,
    TokenScores,
)
from hymba_jax.inference.completion_stream import (
    CompletionStream,
    Delta,
    FinishReason,
    PromptScores,
    check_finite,
)
from hymba_jax.inference.engine import MIN_CHUNK, bucket
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.prefix_cache import PrefixCache
from hymba_jax.inference.programs import DECODE_STEPS
from hymba_jax.inference.sampling import MAX_ALTERNATIVES
from hymba_jax.inference.warmup import prompt_lengths
from hymba_jax.serving.grammar import Grammar, Matcher
from hymba_jax.types import Float

MAX_STOP_TOKENS = 32  # of a request, the model's own included
MAX_LOGIT_BIAS = 100.0


class QueueFull(HymbaError):
    """As many requests are waiting as may."""


class DeadlineExceeded(HymbaError):
    """A request was not complete in its time."""


type Output = Delta | HymbaError
"""What becomes of a request: deltas of its samples, or the error that ends it."""


def check_batch(slots: int, decode_steps: int = 1) -> None:
    """Raises HymbaError for a batch that no `Scheduler` has."""
    if slots != bucket(slots):
        raise HymbaError(f"slots is {slots}, not a power of two")
    if not 1 <= decode_steps <= DECODE_STEPS:
        raise HymbaError(f"decode_steps is {decode_steps}, not 1 to {DECODE_STEPS}")


@dataclass(frozen=True)
class GenerationRequest:
    """What is to be generated.

    Attributes:
      prompt: its tokens.
      sampling: how each sample is sampled; its `num_samples` is ignored.
      num_samples: completions of the prompt.
      logit_bias: tokens with what is added to their logits.
      alternatives: how many of the likeliest tokens are reported beside each sampled one.
      timeout: seconds from its submission in which it must be complete.
      grammar: that completions have to follow.
      scores_prompt: whether the prompt's scores come before its completions.
      is_prompt_only: it ends behind the prompt, and nothing is sampled.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    num_samples: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()
    alternatives: int = 0
    timeout: float | None = None
    grammar: Grammar | None = None
    scores_prompt: bool = False
    is_prompt_only: bool = False


def _is_last(output: Output) -> bool:
    """Whether a sample ends with it."""
    return isinstance(output, Delta) and output.finish_reason is not None


@dataclass(eq=False)
class Job:
    """A request that was submitted.

    Attributes:
      deliver: is called by the thread of `Scheduler.step` with each output.
      deadline: by the scheduler's clock.
      has_ended: nothing more is delivered: an error was, or it was cancelled. Set by `cancel`.
      is_any_cancelled: is set with it, for the scheduler to look which.
    """

    request: GenerationRequest
    deliver: Callable[[Output], None]
    deadline: float = float("inf")
    has_ended: bool = False
    is_any_cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Frees its slots at the next step; from any thread."""
        self.has_ended = True
        self.is_any_cancelled.set()

    def fail(self, error: HymbaError) -> None:
        """Ends it with an error, unless it has ended."""
        if not self.has_ended:
            self.has_ended = True
            self.deliver(error)


@dataclass
class _Prefill:
    """A prompt that is being prefilled, then the state that its samples start from."""

    job: Job
    state: Prefilled
    chunks: deque[PaddedChunk]
    length: int  # tokens that were prefilled
    to_keep: dict[int, bytes]  # as of `PrefixCache.look_up`
    chunk_scores: list[ChunkScores] = field(default_factory=list)  # if asked for
    scores: PromptScores | None = None
    next_sample: int = 0


class _Running(NamedTuple):
    """The sequence in a row of the batch."""

    job: Job
    stream: CompletionStream
    request: Request
    matcher: Matcher | None


class _Unread(NamedTuple):
    """What was sampled for some rows of the batch, each in a row of `sampled`."""

    rows: dict[int, tuple[int, _Running]]
    sampled: SampledTokens


@dataclass
class Scheduler:
    """A running batch, and the requests that wait to join it.

    `submit` and `Job.cancel` may be called by any thread, everything else by one.

    Attributes:
      slots: sequences that are decoded at the same time, a power of two.
      max_waiting: requests that may wait for a slot.
      decode_steps: tokens of each sequence between two looks at the queue, at most.
      prefix_bytes: of memory for states after beginnings of prompts (`PrefixCache`).
      other_models: bytes that they take on the device.
      clock: seconds, for deadlines.
      num_bytes: of the device's memory, for the model and its states.

    Raises:
      HymbaError: a value is impossible, or the device has too little memory.
    """

    model: LanguageModel
    slots: int = 8
    max_waiting: int = 256
    decode_steps: int = 4
    prefix_bytes: int = 0
    other_models: int = 0
    clock: Callable[[], float] = time.monotonic
    _waiting: deque[Job] = field(init=False, default_factory=deque)
    _prefill: _Prefill | None = field(init=False, default=None)
    _rows: dict[int, _Running] = field(init=False, default_factory=dict)
    _unread: deque[_Unread] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        check_batch(self.slots, self.decode_steps)
        self._engine = self.model.engine
        self._context = self._engine.max_context
        max_states = self.prefix_bytes // self._engine.row_bytes(self._context)
        # With two prompts: one that is being prefilled, and the copy that becomes a row.
        sizes = self.slots, self._context, 2 + max_states
        self.num_bytes = self._engine.memory_bytes(*sizes)
        advice = "reduce slots, context or prefix_cache"
        self._engine.check_memory(*sizes, self.other_models, advice)
        self.prefixes = PrefixCache(self._engine.max_chunk, max_states)
        self._state = self._engine.init_state(self.slots, self._context, MAX_STOP_TOKENS)
        self._free = [*range(self.slots)]
        self._abandoned: set[int] = set()  # rows whose sequences the device has not stopped
        self._num_completed = 0
        self._lock = threading.Lock()  # of what waits
        self._is_any_cancelled = threading.Event()
        self._earliest_deadline = float("inf")  # of what waits; earlier if that has left

    @property
    def notes(self) -> list[str]:
        """What a user should know, a line each."""
        size = self._engine.row_bytes(self._context)
        if not 0 < self.prefix_bytes < size:
            return []
        return [
            f"nothing is kept of prompts: a state takes {size} bytes, prefix_cache is "
            f"{self.prefix_bytes}"
        ]

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._rows)

    @property
    def num_completed(self) -> int:
        """Sequences that were completed, those of `warmup` aside."""
        return self._num_completed

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot, or for one for another sample."""
        return len(self._waiting) + (self._prefill is not None)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._rows or self._prefill or self._waiting or self._unread)

    def submit(self, request: GenerationRequest, deliver: Callable[[Output], None]) -> Job:
        """Queues a request.

        Args:
          deliver: is called by the thread of `step` with each output; the last ones are the deltas
            with a finish reason of all samples, or one error.

        Raises:
          QueueFull: too many requests wait already.
          HymbaError: it could never be served.
        """
        self._check(request)
        timeout = float("inf") if request.timeout is None else request.timeout
        deadline = self.clock() + timeout
        job = Job(request, deliver, deadline, is_any_cancelled=self._is_any_cancelled)
        with self._lock:
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(f"{self.max_waiting} requests are waiting already: try again later")
            self._waiting.append(job)
            self._earliest_deadline = min(self._earliest_deadline, deadline)
        return job

    def step(self) -> None:
        """Frees, prefills, decodes and delivers, once each."""
        self._drop_ended()
        self._prefill_some()
        if self._rows:
            self._decode()
        else:
            self.deliver()

    def warmup(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Compiles every program that requests use, by serving some.

        Args:
          is_stopping: whether to leave the rest out, asked before each step.

        Raises:
          HymbaError: the model's logits are not finite.
        """
        for length in prompt_lengths(self._engine):
            sampling = SamplingConfig(max_new_tokens=min(2, self._context - length))
            prompt = [self.model.tokenizer.eos_id] * length
            scored = length <= self._engine.max_chunk  # chunks of every width are among these
            request = GenerationRequest(prompt, sampling, num_samples=2, scores_prompt=scored)
            outputs: list[Output] = []
            job = Job(request, outputs.append, is_any_cancelled=self._is_any_cancelled)
            with self._lock:  # requests of clients may fill the queue already
                self._waiting.appendleft(job)
            while sum(map(_is_last, outputs)) < request.num_samples:
                if is_stopping():
                    job.cancel()
                    return
                self.step()
                for error in outputs:
                    if isinstance(error, HymbaError):
                        raise error
            self._num_completed -= request.num_samples
        self._state = self._engine.stop(self._engine.set_bias(self._state, {}), [])
        self.prefixes.clear()

    def deliver(self, but: int = 0) -> None:
        """Delivers what was sampled, but for the last so many times; a step leaves the last."""
        while len(self._unread) > but:
            self._push(*self._unread.popleft())

    def fail(self, error: HymbaError) -> None:
        """Ends every request with an error."""
        for job in self._jobs():
            job.fail(error)
        self._unread.clear()
        self._is_any_cancelled.set()
        self._drop_ended()

    def _check(self, request: GenerationRequest) -> None:
        """Raises HymbaError for what could never be served."""
        wanted = 0 if request.is_prompt_only else request.sampling.max_new_tokens
        vocab = self.model.config.num_embeddings
        if not request.prompt:
            raise HymbaError("the prompt is empty")
        if len(request.prompt) + wanted > self._context:
            raise HymbaError(
                f"the prompt has {len(request.prompt)} tokens, and {wanted} new ones are asked "
                f"for: together they are more than the context of {self._context}"
            )
        if not 0 <= request.alternatives <= MAX_ALTERNATIVES:
            raise HymbaError(
                f"{request.alternatives} likeliest tokens are asked for, not 0 to "
                f"{MAX_ALTERNATIVES}"
            )
        for token, bias in request.logit_bias:
            if not 0 <= token < vocab:
                raise HymbaError(f"logit_bias: token {token} is outside the vocabulary of {vocab}")
            if not abs(bias) <= MAX_LOGIT_BIAS:
                raise HymbaError(
                    f"logit_bias: {bias} is not -{MAX_LOGIT_BIAS:.0f} to {MAX_LOGIT_BIAS:.0f}"
                )
        self.model.check_stop(request.sampling)
        if len(self.model.stop_tokens(request.sampling)) > MAX_STOP_TOKENS:
            raise HymbaError(f"there are more than {MAX_STOP_TOKENS} stop tokens")

    def _jobs(self) -> list[Job]:
        with self._lock:
            jobs = [*self._waiting]
        return jobs + self._admitted_jobs()

    def _admitted_jobs(self) -> list[Job]:
        """Those that do not wait any more."""
        jobs = [self._prefill.job] if self._prefill else []
        return jobs + [running.job for running in self._rows.values()]

    def _drop_ended(self) -> None:
        """Frees what cancelled and late requests hold."""
        now = self.clock()
        is_any_late = self._earliest_deadline < now
        if any(job.deadline < now for job in self._admitted_jobs()):
            self.deliver()  # some may be complete
        for job in self._jobs() if is_any_late else self._admitted_jobs():
            if job.deadline < now:
                job.fail(DeadlineExceeded(f"not complete in {job.request.timeout:g} seconds"))
        # To look at all at each step would take quadratic time.
        if is_any_late or self._is_any_cancelled.is_set():
            self._is_any_cancelled.clear()
            with self._lock:
                self._waiting = deque(job for job in self._waiting if not job.has_ended)
                deadlines = (job.deadline for job in self._waiting)
                self._earliest_deadline = min(deadlines, default=float("inf"))
        if self._prefill and self._prefill.job.has_ended:
            self._prefill = None
        for row, running in [*self._rows.items()]:
            if running.job.has_ended:
                self._release(row)
                self._abandoned.add(row)

    def _release(self, row: int) -> None:
        del self._rows[row]
        self._free.append(row)

    def _prefill_some(self) -> None:
        budget = max(self._engine.max_chunk, MIN_CHUNK)
        while self._free and (prefill := self._next_prefill()):
            cost = prefill.chunks[0].tokens.shape[1] if prefill.chunks else MIN_CHUNK
            if cost > budget:
                return
            budget -= cost
            if prefill.chunks:
                self._prefill_chunk(prefill)
            else:
                self._join(prefill)

    def _prefill_chunk(self, prefill: _Prefill) -> None:
        chunk, is_start = prefill.chunks.popleft(), not prefill.length
        request = prefill.job.request
        if request.scores_prompt:
            targets = np.zeros_like(chunk.tokens)
            following = request.prompt[prefill.length + 1 :][: targets.shape[1]]
            targets[0, : len(following)] = following
            prefill.state, scores = self._engine.score_chunk(
                prefill.state,
                chunk,
                targets,
                is_start=is_start,
                alternatives=request.alternatives > 0,
            )
            prefill.chunk_scores.append(scores)
        else:
            prefill.state = self._engine.prefill_chunk(prefill.state, chunk, is_start=is_start)
        prefill.length += int(chunk.lengths[0])
        if key := prefill.to_keep.get(prefill.length):
            self.prefixes.keep(key, self._copy(prefill.state))

    def _copy(self, state: Prefilled) -> Prefilled:
        """The programs of the engine take the memory of their arguments."""
        return self._engine.repeat(state, [0])

    def _next_prefill(self) -> _Prefill | None:
        """What is being prefilled, or else the request that has waited longest."""
        if self._prefill is None:
            # It waits until it is here: an error that ends all requests must not miss it.
            job = self._waiting[0] if self._waiting else None
            if job is not None:
                length, kept, to_keep = 0, None, dict[int, bytes]()
                if not job.request.scores_prompt:  # which needs the logits behind every token
                    length, kept, to_keep = self.prefixes.look_up(job.request.prompt)
                chunks = self._engine.chunks([job.request.prompt[length:]])
                state = self._copy(kept) if kept else self._engine.init_prefill(1, self._context)
                self._prefill = _Prefill(job, state, deque(chunks), length, to_keep)
                with self._lock:
                    self._waiting.popleft()
        return self._prefill

    def _join(self, prefill: _Prefill) -> None:
        """Inserts the next sample of a prefilled prompt into the batch."""
        job, sample, state = prefill.job, prefill.next_sample, prefill.state
        request = job.request
        is_last = sample + 1 == request.num_samples
        if not self._deliver_prompt(prefill):
            return
        if not is_last:
            state = self._copy(state)
        row = self._free[-1]
        stream = CompletionStream(
            self.model.tokenizer,
            request.prompt,
            request.sampling,
            self._context,
            sample=sample,
            alternatives=request.alternatives,
        )
        try:
            matcher = request.grammar.start() if request.grammar else None
            mask = matcher.mask() if matcher else None
        except HymbaError as error:
            job.fail(error)
            self._prefill = None
            return
        inserted = Request(
            request.prompt,
            request.sampling,
            sample,
            stream.max_new_tokens,
            self.model.stop_tokens(request.sampling),
            request.logit_bias,
            alternatives=request.alternatives > 0,
            mask=mask,
        )
        self._state, sampled = self._engine.insert(state, [inserted], self._state, [row])
        self._free.pop()
        prefill.next_sample += 1
        if is_last:
            self._prefill = None
        self._abandoned.discard(row)
        self._rows[row] = _Running(job, stream, inserted, matcher)
        self._unread.append(_Unread({row: (0, self._rows[row])}, sampled))

    def _deliver_prompt(self, prefill: _Prefill) -> bool:
        """Delivers what a sample has before its first token, and says whether it has one."""
        request = prefill.job.request
        try:
            if request.scores_prompt and prefill.scores is None:
                self.deliver()  # before it waits for the prompt
                prefill.scores = self._prompt_scores(prefill)
        except HymbaError as error:
            prefill.job.fail(error)
            self._prefill = None
            return False
        reason: FinishReason | None = "length" if request.is_prompt_only else None
        if prefill.scores or reason:
            delta = Delta(0, prefill.next_sample, "", [], [], reason, prompt=prefill.scores)
            prefill.job.deliver(delta)
        if reason:
            self._num_completed += 1
            prefill.next_sample += 1
            if prefill.next_sample == request.num_samples:
                self._prefill = None
        return reason is None

    def _prompt_scores(self, prefill: _Prefill) -> PromptScores:
        """How likely a prompt's tokens are. Raises HymbaError if the logits are not finite."""
        request = prefill.job.request
        chunks = zip(*jax.device_get(prefill.chunk_scores), strict=True)
        count = len(request.prompt) - 1
        scores = TokenScores(*(np.concatenate(each, 1)[0, :count] for each in chunks))
        check_finite("the prompt", scores.log_probs)
        top = zip(scores.top_tokens.tolist(), scores.top_log_probs.tolist(), strict=True)
        likeliest = [[*zip(*pair, strict=True)][: request.alternatives] for pair in top]
        alternatives = likeliest if request.alternatives else []
        return PromptScores([*request.prompt], scores.log_probs.tolist(), alternatives)

    def _decode(self) -> None:
        self._deliver_for_masks()
        if self._abandoned:
            self._state = self._engine.stop(self._state, sorted(self._abandoned))
            self._abandoned.clear()
        biases = self._masked_biases()
        if biases:
            self._state = self._engine.set_bias(self._state, biases)
        is_prefilling = self._prefill is not None and self._free
        steps = 1 if biases or is_prefilling else self.decode_steps
        self._state, sampled = self._engine.decode(self._state, steps)
        rows = {row: (row, running) for row, running in self._rows.items()}
        self._unread.append(_Unread(rows, sampled))
        self.deliver(but=1)

    def _deliver_for_masks(self) -> None:
        """Delivers what rows that follow a grammar have sampled: their next masks depend on it."""
        for rows, sampled in self._unread:
            if followers := {row: rows[row] for row in rows if rows[row][1].matcher}:
                self._push(followers, sampled)
                for row in followers:
                    del rows[row]

    def _masked_biases(self) -> dict[int, Float[np.ndarray, " vocab"]]:
        """What is added to the logits of rows that follow a grammar."""
        biases: dict[int, Float[np.ndarray, " vocab"]] = {}
        for row, running in self._rows.items():
            if running.matcher is None or running.job.has_ended:
                continue
            try:
                masked = running.request._replace(mask=running.matcher.mask())
            except HymbaError as error:
                running.job.fail(error)
            else:
                biases[row] = masked.bias(self.model.config.num_embeddings)
        return biases

    def _push(self, rows: dict[int, tuple[int, _Running]], sampled: SampledTokens) -> None:
        values: Any = jax.device_get(sampled)
        for row, (index, running) in rows.items():
            job, stream, _, matcher = running
            if job.has_ended or self._rows.get(row) is not running:  # since it was sampled
                continue
            try:
                delta = stream.push(*(array[index] for array in values))
            except HymbaError as error:
                job.fail(error)
                continue
            if delta.text or delta.tokens or delta.finish_reason:
                job.deliver(delta)
            if stream.finished:
                self._num_completed += 1
                self._release(row)
                if not values.stopped[index]:  # by a stop string, which the device does not know
                    self._abandoned.add(row)
            elif matcher is not None:
                matcher.push(int(values[0][index][0]))
