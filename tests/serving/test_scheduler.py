"""Continuous batching: whatever the schedule, each request has the tokens that it has alone."""

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inference.models import TINY, compilations
from serving.served import CHUNK, CONTEXT, SLOTS, model

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.completion_stream import Delta
from hymba_jax.inference.engine import MIN_CHUNK
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.parallel import memory
from hymba_jax.serving.command import ServeConfig
from hymba_jax.serving.scheduler import (
    DeadlineExceeded,
    GenerationRequest,
    QueueFull,
    Scheduler,
)


@functools.cache
def shared_scheduler():
    """For tests that leave it as they found it, which `serve` checks; with five states kept."""
    prefix_bytes = 5 * model().engine.row_bytes(CONTEXT)
    scheduler = Scheduler(model(), slots=SLOTS, prefix_bytes=prefix_bytes)
    scheduler.warmup()
    return scheduler


@functools.cache
def cold_scheduler():
    """It keeps no state between requests, and looks at each token."""
    return Scheduler(model(), slots=SLOTS, decode_steps=1)


def prompt_of(length):
    """Prompts share their beginnings, but for what comes after the first 40 tokens."""
    shared, rest = (np.random.default_rng(seed).integers(0, 256, 64) for seed in (0, length))
    text = np.concatenate([shared[:40], rest])[: length - 1]
    return [TINY.bos_token_id, *text.tolist()]


def request_of(length=5, new=8, *, samples=1, alternatives=0, bias=(), timeout=None, **sampling):
    sampling = SamplingConfig(max_new_tokens=new, **sampling)
    return GenerationRequest(prompt_of(length), sampling, samples, bias, alternatives, timeout)


class Arrival(NamedTuple):
    """A request, the step before which it comes, and the outputs after which it is cancelled."""

    request: GenerationRequest
    step: int = 0
    cancel_after: int | None = None


def serve(arrivals, scheduler=None):
    """The outputs of each arrival, when all are complete."""
    scheduler = scheduler or shared_scheduler()
    outputs, jobs, step = [[] for _ in arrivals], [None] * len(arrivals), 0
    while step <= max(arrival.step for arrival in arrivals) or scheduler.has_work:
        for i, arrival in enumerate(arrivals):
            if arrival.step == step:
                jobs[i] = scheduler.submit(arrival.request, outputs[i].append)
            if jobs[i] and arrival.cancel_after == len(outputs[i]):
                jobs[i].cancel()
        scheduler.step()
        step += 1
    assert_all_free(scheduler)
    return outputs


def assert_all_free(scheduler):
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert sorted(scheduler._free) == list(range(scheduler.slots))


def sampled(outputs):
    """The tokens and log-probabilities of each sample, and the samples' finish reasons."""
    rows = {}
    for delta in outputs:
        assert isinstance(delta, Delta), delta
        tokens, log_probs, reasons = rows.setdefault(delta.sample, ([], [], []))
        tokens += delta.tokens
        log_probs += delta.log_probs
        reasons += [delta.finish_reason] if delta.finish_reason else []
    return rows


REQUESTS = (
    request_of(1, 9),
    request_of(40, 3, temperature=1.0, seed=3),
    request_of(17, 12, temperature=0.8, top_k=30, top_p=0.9, seed=4, samples=3),
    request_of(16, 20, frequency_penalty=0.5, presence_penalty=1.0, alternatives=5),
    request_of(33, 31, temperature=1.4, min_p=0.02, repetition_penalty=1.3),
    request_of(7, 2, bias=((65, 100.0),), samples=2, temperature=1.0),
)


@functools.cache
def alone(index):
    (outputs,) = serve([Arrival(REQUESTS[index])], cold_scheduler())
    return sampled(outputs)


ARRIVALS = st.tuples(
    st.integers(0, len(REQUESTS) - 1), st.integers(0, 12), st.none() | st.integers(0, 6)
)


@settings(derandomize=True, deadline=None, max_examples=8, database=None)
@given(arrivals=st.lists(ARRIVALS, min_size=1, max_size=8))
@example([(i % len(REQUESTS), 0, None) for i in range(9)])  # more than there are slots
@example([(4, 0, None), (1, 3, None), (4, 3, 2), (2, 3, None), (3, 4, 0)])
def test_tokens_do_not_depend_on_the_schedule(arrivals):
    """To the bit, log-probabilities too, whatever prefixes are kept and however many tokens are
    decoded at once; a cancelled request has the first of them."""
    results = serve([Arrival(REQUESTS[i], *when) for i, *when in arrivals])
    for (i, _, cancelled), outputs in zip(arrivals, results, strict=True):
        expected, actual = alone(i), sampled(outputs)
        if cancelled is None:
            assert actual == expected
        for sample, (tokens, log_probs, _) in actual.items():
            assert tokens == expected[sample][0][: len(tokens)]
            assert log_probs == expected[sample][1][: len(tokens)]


@pytest.mark.parametrize("index", [0, 4])
def test_tokens_are_those_of_generate(index):
    """Which prefills and decodes in batches of other sizes, so that log-probabilities round
    otherwise: float32 in another order of adding, on logits whose range is about 12."""
    request = REQUESTS[index]
    config = SamplingConfig(**{**vars(request.sampling), "num_samples": request.num_samples})
    completions = model().generate([request.prompt], config)
    for completion, (tokens, log_probs, reasons) in zip(
        completions, alone(index).values(), strict=True
    ):
        assert tokens == completion.tokens
        np.testing.assert_allclose(log_probs, completion.log_probs, rtol=0, atol=1.2e-4)
        assert reasons == [completion.finish_reason]


def test_nothing_is_compiled_after_warmup():
    shared_scheduler()
    mix = [*REQUESTS, request_of(63, 1, stop=("a", "bc"), stop_tokens=(*range(20),))]
    mix += [replace(request_of(40, 2, alternatives=n), scores_prompt=True) for n in (0, 3)]
    with compilations() as names:
        serve([Arrival(request, i) for i, request in enumerate(mix * 2)])
    assert names == []


def test_alternatives_come_with_each_token():
    """The first is what greedy decoding samples, with the same bits; beside a request without."""
    requests = [request_of(17, 12, alternatives=5), REQUESTS[0]]
    outputs, without = serve([Arrival(request) for request in requests])
    ((tokens, log_probs, _),) = sampled(outputs).values()
    reported = [top for delta in outputs for top in delta.alternatives]
    assert [top[0] for top in reported] == [*zip(tokens, log_probs, strict=True)]
    for top in reported:
        assert len(top) == 5
        assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
    assert [delta.alternatives for delta in without] == [[]] * len(without)


def test_a_stop_string_ends_a_sequence():
    text = "".join(delta.text for delta in serve([Arrival(REQUESTS[0])])[0])
    stop = text[4:6]
    (outputs,) = serve([Arrival(request_of(1, 9, stop=(stop,)))])
    assert "".join(delta.text for delta in outputs) == text[: text.index(stop)]
    assert outputs[-1].finish_reason == "stop"


def test_a_bias_decides():
    """Far above the range of the logits, and below it."""
    (outputs,) = serve([Arrival(request_of(5, 6, bias=((65, 100.0),)))])
    assert sampled(outputs)[0][0] == [65] * 6
    (outputs,) = serve([Arrival(request_of(5, 6, bias=((65, 100.0), (66, 100.0), (65, -100.0))))])
    assert sampled(outputs)[0][0] == [66] * 6


def test_a_stream_waits_for_a_chunk_of_other_prompts_at_most(monkeypatch):
    """Between two decoding steps, however many prompts wait."""
    scheduler, engine = shared_scheduler(), model().engine
    prefilled, between = [], []

    def recorded(state, chunk, **options):
        prefilled.append(chunk.tokens.size)
        return type(engine).prefill_chunk(engine, state, chunk, **options)

    monkeypatch.setattr(engine, "prefill_chunk", recorded)

    def decode(*args):
        between.append(sum(prefilled))
        prefilled.clear()
        return type(engine).decode(engine, *args)

    monkeypatch.setattr(engine, "decode", decode)
    scheduler.submit(request_of(3, 50), lambda delta: None)
    scheduler.step()
    for i in range(20):
        scheduler.submit(request_of(60 if i % 2 else 2, 2), lambda delta: None)
    while scheduler.has_work:
        scheduler.step()
    # The budget is MIN_CHUNK where chunks are shorter than that.
    assert max(between) == max(CHUNK, MIN_CHUNK)
    assert_all_free(scheduler)


def test_prefixes_are_prefilled_once():
    """A system message of two chunks: the second prompt with it shows where they part, and the
    third one begins there, as does the next turn of a conversation where its last one ended. All
    have the bits of a cold start."""
    scheduler = Scheduler(
        model(), slots=SLOTS, prefix_bytes=3 * model().engine.row_bytes(CONTEXT) + 1
    )
    system, rng = prompt_of(33), np.random.default_rng(5)
    turns = [[*system, *rng.integers(0, 256, 20).tolist()] for _ in range(3)]
    turns += [[*turns[2], 7, 8, 9], [*turns[0], 7, 8, 9], turns[0][:49], turns[0][:48]]
    hits = []
    for prompt in turns:
        before = scheduler.prefixes.hit_tokens
        request = GenerationRequest(prompt, SamplingConfig(max_new_tokens=3))
        (outputs,) = serve([Arrival(request)], scheduler)
        (cold,) = serve([Arrival(request)], cold_scheduler())
        assert sampled(outputs) == sampled(cold)
        hits.append(scheduler.prefixes.hit_tokens - before)
    # Kept are the states after 32 tokens, and after 48 of three prompts; but only three of these
    # four, so that of the first prompt is gone when it is asked for, and there again after that. A
    # token must follow what is found.
    assert hits == [0, 0, 32, 48, 32, 48, 32]
    assert scheduler.prefixes.queried_tokens == sum(map(len, turns))


def test_several_tokens_are_decoded_at_once_when_no_prompt_is_to_be_prefilled(monkeypatch):
    """Into a free slot; what waits for a slot does not hold up the others."""
    scheduler, engine, steps = shared_scheduler(), model().engine, []

    def decode(state, count):
        steps.append(count)
        return type(engine).decode(engine, state, count)

    monkeypatch.setattr(engine, "decode", decode)
    scheduler.submit(request_of(2, 40), lambda delta: None)
    while scheduler.num_running < 1:
        scheduler.step()
    scheduler.step()
    assert steps[-1] == 4
    for _ in range(SLOTS):
        scheduler.submit(request_of(2, 40), lambda delta: None)
    scheduler.step()
    assert steps[-1] == 1
    while scheduler.num_running < SLOTS:
        scheduler.step()
    scheduler.step()
    assert (steps[-1], scheduler.num_waiting) == (4, 1)
    while scheduler.has_work:
        scheduler.step()


def test_requests_are_served_in_their_order():
    first = []
    requests = [request_of(60, 4), *[request_of(2, 4)] * 8]
    scheduler = shared_scheduler()
    for i, request in enumerate(requests):
        scheduler.submit(request, lambda delta, i=i: first.append(i))
    while scheduler.has_work:
        scheduler.step()
    assert list(dict.fromkeys(first)) == list(range(9))


def test_a_cancelled_request_frees_its_slots_at_the_next_step():
    scheduler = shared_scheduler()
    outputs = []
    jobs = [scheduler.submit(request_of(2, 60), outputs.append) for _ in range(SLOTS)]
    waiting = scheduler.submit(request_of(4, 60), outputs.append)
    while scheduler.num_running < SLOTS:
        scheduler.step()
    assert scheduler.num_waiting == 1
    for job in [*jobs, waiting]:
        job.cancel()
    count = len(outputs)
    scheduler.step()
    assert_all_free(scheduler)
    assert len(outputs) == count
    assert not scheduler.has_work


def test_deltas_are_delivered_while_the_next_tokens_are_decoded(monkeypatch):
    scheduler, order = cold_scheduler(), []
    decode = scheduler._engine.decode
    monkeypatch.setattr(
        scheduler._engine, "decode", lambda *args: order.append("decode") or decode(*args)
    )
    scheduler.submit(request_of(2, 4), lambda delta: order.append(delta.finish_reason))
    while scheduler.has_work:
        scheduler.step()
    # The first token is sampled with the prompt; the last decoding finds that the row has stopped.
    assert order == ["decode", None, "decode", None, "decode", None, "decode", "length"]


def test_what_is_complete_at_the_deadline_is_delivered():
    """And at the end, and not after an error that ends all."""
    now = [100.0]
    scheduler = Scheduler(model(), slots=SLOTS, decode_steps=1, clock=lambda: now[0])
    outputs = [[], [], []]

    def begin(to):
        scheduler.submit(request_of(2, 2, timeout=5), to.append)
        while not scheduler.num_running:
            scheduler.step()

    begin(outputs[0])
    now[0] += 6
    scheduler.step()
    assert sampled(outputs[0])[0][2] == ["length"]
    begin(outputs[1])
    scheduler.deliver()
    assert sampled(outputs[1])[0][2] == ["length"]
    begin(outputs[2])
    scheduler.fail(HymbaError("over"))
    assert not scheduler.has_work
    assert [str(output) for output in outputs[2][1:]] == ["over"]


def test_deadlines():
    """Of requests that run, one that is being prefilled and one that waits."""
    now = [100.0]
    scheduler = Scheduler(model(), slots=SLOTS, decode_steps=1, clock=lambda: now[0])
    requests = [
        *[request_of(2, 60, timeout=5)] * (SLOTS - 1),
        request_of(63, 1, timeout=8),
        request_of(2, 4, timeout=2),
        request_of(2, 4),
    ]
    outputs = [[] for _ in requests]
    for request, to in zip(requests, outputs, strict=True):
        scheduler.submit(request, to.append)
    for _ in range(2 * (SLOTS - 1) + 1):  # two each, and a chunk of the next
        scheduler.step()
    assert scheduler.num_running == SLOTS - 1
    assert scheduler.num_waiting == 3  # one of them is being prefilled
    now[0] += 8.5
    while scheduler.has_work:
        scheduler.step()
    errors = [[str(error) for error in to if isinstance(error, HymbaError)] for to in outputs]
    seconds = [*[5] * (SLOTS - 1), 8, 2]
    assert errors == [*[[f"not complete in {limit} seconds"] for limit in seconds], []]
    assert all(outputs[: SLOTS - 1])
    assert not any(len(to) > 1 for to in outputs[SLOTS - 1 : -1])
    assert isinstance(outputs[0][-1], DeadlineExceeded)
    assert sampled(outputs[-1])[0][2] == ["length"]
    assert_all_free(scheduler)


def test_a_step_does_not_look_at_all_that_waits(monkeypatch):
    """Nor does it forget who was cancelled there."""
    scheduler = Scheduler(model(), slots=SLOTS, max_waiting=100)
    outputs = []
    jobs = [scheduler.submit(request_of(2, 60, timeout=99), outputs.append) for _ in range(100)]
    looked_at = []
    monkeypatch.setattr(scheduler, "_jobs", lambda: looked_at.append(1) or jobs)
    while scheduler.num_running < SLOTS:
        scheduler.step()
    waiting = scheduler._waiting
    scheduler.step()
    assert scheduler._waiting is waiting
    for job in jobs:
        job.cancel()
    scheduler.step()
    assert_all_free(scheduler)
    assert not looked_at


def test_room_for_no_state_is_said():
    prefix_bytes = model().engine.row_bytes(CONTEXT) - 1
    (note,) = Scheduler(model(), slots=SLOTS, prefix_bytes=prefix_bytes).notes
    assert f"a state takes {prefix_bytes + 1} bytes, prefix_cache is {prefix_bytes}" in note
    assert not shared_scheduler().notes


def test_a_full_queue():
    scheduler = Scheduler(model(), slots=SLOTS, max_waiting=2)
    jobs = [scheduler.submit(request_of(), lambda delta: None) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        scheduler.submit(request_of(), lambda delta: None)
    for job in jobs:
        job.cancel()
    scheduler.step()
    scheduler.submit(request_of(), lambda delta: None)


def test_warmup_beside_requests_of_clients():
    """It needs no place in the queue, waits for no client, and leaves when it has to stop."""
    scheduler = Scheduler(model(), slots=SLOTS, max_waiting=1)
    outputs = []
    job = scheduler.submit(request_of(new=50), outputs.append)
    scheduler.warmup(lambda: True)
    assert not outputs
    scheduler.warmup()
    assert not any(isinstance(output, HymbaError) for output in outputs)
    while not (outputs and outputs[-1].finish_reason):
        scheduler.step()
    assert outputs[-1].finish_reason == "length"
    assert not job.has_ended
    assert scheduler.num_completed == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (request_of(60, 5), "60 tokens, and 5 new ones .* more than the context of 64"),
        (request_of(alternatives=21), "21 likeliest tokens are asked for, not 0 to 20"),
        (request_of(bias=((999, 1.0),)), "token 999 is outside the vocabulary of 259"),
        (request_of(bias=((9, float("nan")),)), "logit_bias: nan is not -100 to 100"),
        (request_of(stop_tokens=(*range(40),)), "more than 32 stop tokens"),
        (request_of(stop_tokens=(999,)), "stop token 999 is not in the tokenizer"),
        (GenerationRequest([], SamplingConfig()), "the prompt is empty"),
    ],
)
def test_what_could_never_be_served_is_refused(request_, message):
    with pytest.raises(HymbaError, match=message):
        shared_scheduler().submit(request_, lambda delta: None)
    assert not shared_scheduler().has_work


@pytest.mark.parametrize(
    ("options", "message"),
    [({"slots": 3}, "slots is 3, not a power of two"), ({"decode_steps": 17}, "not 1 to 16")],
)
def test_impossible_options(options, message):
    with pytest.raises(HymbaError, match=message):
        Scheduler(model(), **options)


def test_the_memory_of_several_models_is_counted(monkeypatch):
    """Each alone would fit."""
    monkeypatch.setattr(ModelChoice, "load", lambda self, **options: model())
    config = ServeConfig(ModelChoice("m"), adapter=("a=dir",), slots=SLOTS, prefix_cache=0)
    needed = Scheduler(model(), slots=SLOTS).num_bytes
    monkeypatch.setattr(memory, "host_memory", lambda: 2 * needed - 1)
    with pytest.raises(HymbaError, match="beside the parameters and states of other models: "):
        config.load()
    monkeypatch.setattr(memory, "host_memory", lambda: 2 * needed)
    assert [*config.load()] == ["m", "a"]


def test_logits_that_are_not_finite_end_one_request(monkeypatch):
    """The others go on."""
    scheduler, bad = shared_scheduler(), []
    broken = model().engine.insert

    def insert(prefilled, requests, state, rows):
        if len(requests[0].prompt) == 9:
            prefilled = prefilled._replace(last_hidden=prefilled.last_hidden * np.nan)
        return broken(prefilled, requests, state, rows)

    monkeypatch.setattr(model().engine, "insert", insert)
    scheduler.submit(request_of(9), bad.append)
    (good,) = serve([Arrival(REQUESTS[0])])
    assert ["are not finite" in str(error) for error in bad] == [True]
    assert sampled(good) == alone(0)
