"""What is measured of a server, for Prometheus; names are vLLM's where the meaning is the same."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hymba_jax.inference.completion_stream import Delta, FinishReason
from hymba_jax.serving.scheduler import Scheduler

_TO_FIRST = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and histograms of the requests of one server.

    Args:
      schedulers: of each model, whose name is a label of its metrics.
    """

    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        self._registry = CollectorRegistry()
        label: Any = {"registry": self._registry, "labelnames": ["model_name"]}

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, **label)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, **label)

        self._registry.register(_SchedulerCollector(schedulers))
        self._prompt_tokens = counter("vllm:prompt_tokens", "tokens of prompts")
        self._generated = counter("vllm:generation_tokens", "tokens of completions")
        self._finished = Counter(
            "vllm:request_success",
            "completions by finish reason",
            registry=self._registry,
            labelnames=["model_name", "finished_reason"],
        )
        self._to_first = histogram(
            "vllm:time_to_first_token_seconds", "from the request to its first token", _TO_FIRST
        )
        self._between = histogram(
            "vllm:inter_token_latency_seconds", "between tokens of a completion", _BETWEEN
        )
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "from the request to its last token", _WHOLE
        )
        for name in schedulers:  # so that every series is there, at zero, before the first request
            for counter_ in (self._prompt_tokens, self._generated):
                counter_.labels(name)
            for histogram_ in (self._to_first, self._between, self._whole):
                histogram_.labels(name)
            for reason in get_args(FinishReason.__value__):
                self._finished.labels(name, reason)

    async def observe(
        self, model: str, deltas: AsyncIterator[Delta], prompt_tokens: int
    ) -> AsyncIterator[Delta]:
        """The deltas of a request, measured as they pass."""
        start = time.monotonic()
        before: dict[tuple[int, int], float] = {}  # when each completion had its last tokens
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        between, generated = self._between.labels(model), self._generated.labels(model)
        async for delta in deltas:
            now, place = time.monotonic(), (delta.index, delta.sample)
            if not (delta.tokens or delta.finish_reason):  # its prompt's scores
                yield delta
                continue
            if not before:
                self._to_first.labels(model).observe(now - start)
            if delta.tokens:
                for _ in delta.tokens if place in before else ():
                    between.observe((now - before[place]) / len(delta.tokens))
                generated.inc(len(delta.tokens))
            before[place] = now
            if delta.finish_reason:
                self._finished.labels(model, delta.finish_reason).inc()
            yield delta
        self._whole.labels(model).observe(time.monotonic() - start)

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)


class _SchedulerCollector(Collector):
    """What schedulers know themselves."""

    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        self._schedulers = schedulers

    def collect(self) -> Iterator[Metric]:
        """One metric of each kind."""
        gauges: dict[str, tuple[str, Callable[[Scheduler], int]]] = {
            "num_requests_running": ("sequences in the running batch", lambda s: s.num_running),
            "num_requests_waiting": ("requests that wait for a slot", lambda s: s.num_waiting),
        }
        counters: dict[str, tuple[str, Callable[[Scheduler], int]]] = {
            "prefix_cache_queries": ("tokens looked up", lambda s: s.prefixes.queried_tokens),
            "prefix_cache_hits": (
                "tokens that need not be prefilled",
                lambda s: s.prefixes.hit_tokens,
            ),
        }
        for kind, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in metrics.items():
                family = kind(f"vllm:{name}", text, labels=["model_name"])
                for model, scheduler in self._schedulers.items():
                    family.add_metric([model], value(scheduler))
                yield family
