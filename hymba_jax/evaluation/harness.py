"""A model for lm-evaluation-harness, which asks it for log-likelihoods and completions.

The harness' own command knows only the models that it comes with. With this one it is

    python -m hymba_jax.evaluation.harness --model hymba_jax --model_args path=DIRECTORY --tasks ...
"""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import batched
from typing import Any

import numpy as np

from hymba_jax.checkpoint.checkpoints import silence_orbax
from hymba_jax.config.field_types import shown
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.answers import Answers
from hymba_jax.evaluation.control_marks import encode_marked, is_conversation, mark
from hymba_jax.evaluation.progress import progress_bar
from hymba_jax.evaluation.replicas import Replicas
from hymba_jax.files import check_output_file, resolve_path
from hymba_jax.host import prepare_host
from hymba_jax.inference import LanguageModel
from hymba_jax.inference.completion_stream import check_finite
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.inference.warmup import use_compilation_cache
from hymba_jax.parallel.processes import require_agreement
from hymba_jax.tokenizer.chat_template import answer_end, render_chat

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
except ImportError as error:
    raise HymbaError(
        "tasks take lm-evaluation-harness, which is not installed: "
        'pip install "hymba_jax[evaluate]"'
    ) from error

# What a task may ask of a generation, beside its stop strings and its length.
_FILTERS = ("top_k", "top_p", "min_p")
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "repetition_penalty", *_FILTERS)
MAX_NEW_TOKENS = 256  # of a task that does not say, as of the harness' other models

type Pair = tuple[Any, Sequence[int], Sequence[int]]
"""A request's cache key in the harness or None, the context's tokens and the continuation's."""


@register_model("hymba_jax")
class HarnessModel(TemplateLM):
    """A language model as the harness takes it.

    Text is tokenized as `LanguageModel` does: after the beginning-of-sequence token, and names of
    control tokens in it are ordinary text, but for those that the chat template writes. Requests
    are computed in batches of about the same length; each is computed once, however often it is
    asked. A context that is too long is truncated from the left.

    The same requests have answers of the same bits in any order and on any number of devices; what
    is computed in one batch depends on the batch size, which changes log-likelihoods by rounding.

    Args:
      answers: where answers are kept.
      replicas: what computes them; the model where it is if absent.

    Raises:
      HymbaError: from its methods, if the model cannot do what a task asks for.
    """

    def __init__(
        self,
        model: LanguageModel,
        answers: Answers | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        super().__init__()
        self._model, self._answers = model, answers or Answers()
        self._replicas = replicas or Replicas(model, [model.engine.device])

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        """The model of `--model_args`.

        Args:
          arg_dict: `path`, which is the `model` of other commands; their options `step`, `adapter`,
            `dtype`, `state_dtype` and `context`; and `answers`, the path of an `Answers` file.
          additional_config: `batch_size`. The device is JAX's choice, whatever the harness says.

        Raises:
          HymbaError: there is no such model, or an argument has no meaning.
        """
        known = {field.name for field in dataclasses.fields(ModelChoice)}
        known -= {"model", "batch_size"}
        given = dict(arg_dict)
        directory, file = given.pop("path", ""), given.pop("answers", "")
        if "batch_size" in given:
            raise HymbaError("model_args: batch_size has no effect there: give --batch_size")
        if unknown := sorted(given.keys() - known):
            raise HymbaError(
                f"model_args: no argument {unknown[0]!r}, there are path, answers, "
                f"{', '.join(sorted(known))}"
            )
        if batch_size := (additional_config or {}).get("batch_size"):
            if not str(batch_size).isdecimal():
                raise HymbaError(f"batch_size is {batch_size}: give a number")
            given["batch_size"] = int(batch_size)
        if not directory:
            raise HymbaError("model_args: name a model: path=DIRECTORY")
        model = ModelChoice(directory, **given).load()
        return cls(model, open_answers(file, model), Replicas(model))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        """The model of `--model_args`; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return next(iter(self._model.tokenizer.bos_ids), self.eot_token_id)

    @property
    def max_length(self) -> int:
        """Tokens of context at most."""
        return self._model.engine.max_context

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells cached requests apart by."""
        return self._model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens, by default after the beginning-of-sequence token.

        A conversation has that where its template writes it.
        """
        tokenizer = self._model.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not is_conversation(string)
        return [
            *(tokenizer.bos_ids if add_special_tokens else []),
            *encode_marked(tokenizer, string),
        ]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, for records."""
        return self._model.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, with the template's control tokens marked.

        Args:
          add_generation_prompt: whether an answer begins after it; else its last message does not
            end, and is to be continued.

        Raises:
          HymbaError: there is no template, or it fails.
        """
        tokenizer = self._model.tokenizer
        text = render_chat(tokenizer, chat_history, add_generation_prompt=add_generation_prompt)
        if not add_generation_prompt:
            last = chat_history[-1]["content"].strip()
            text = text[: str(text).rindex(last) + len(last)]
        return mark(tokenizer, text)

    def loglikelihood_rolling(
        self, requests: Iterable[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, after the prefix token; long ones in windows.

        As the harness has it: windows of the model's whole context, of which each token is scored
        in one, with one token of context at least.
        """
        strings = [request.args[0] for request in requests]
        windows: list[list[Pair]] = []
        for string in strings:
            tokens = self.tok_encode(string, add_special_tokens=False)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows.append([(None, *make_disjoint_window(each)) for each in rolling])
        pairs = [pair for each in windows for pair in each]
        scores = iter(self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm))
        totals = [math.fsum(next(scores)[0] for _ in each) for each in windows]
        for string, total in zip(strings, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability, and whether greedy decoding would give it."""
        keys: list[str] = []
        missing: dict[str, tuple[list[int], int]] = {}
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise HymbaError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's "
                    f"context of {self.max_length}"
                )
            context = context or [self.prefix_token_id]
            tokens = [*context, *continuation][-(self.max_length + 1) :]  # as the harness does
            key = self._answers.key("loglikelihood", tokens, len(continuation))
            keys.append(key)
            if key not in self._answers:
                missing[key] = tokens, len(continuation)
        self._score(missing, disable_tqdm)
        results: list[tuple[float, bool]] = []
        for request, key in zip(requests, keys, strict=True):
            total, is_greedy = self._answers[key]
            results.append((total, is_greedy))
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], results[-1])
        return results

    def _score(self, missing: dict[str, tuple[list[int], int]], quiet: bool) -> None:
        """Computes these, and keeps their answers."""
        # Of equal length by their tokens, so that batches do not depend on the order of requests.
        jobs = sorted(missing.items(), key=lambda job: (len(job[1][0]), job[1]), reverse=True)
        if jobs:
            rows = min(len(jobs), self._model.batch_size)
            self._model.engine.check_memory(rows, len(jobs[0][1][0]) - 1)
        self._compute("scoring", _score_batch, [*batched(jobs, self._model.batch_size)], quiet)

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions up to a stop string, without it; answers in a conversation up to their end.

        A request that is asked several times for a sample gets a different one each time.
        """
        keys: list[str] = []
        missing: dict[str, tuple[list[int], SamplingConfig]] = {}
        seen: Counter[str] = Counter()
        arguments = [request.args for request in requests]
        for context, options in arguments:
            config = self._sampling(options)
            if is_conversation(context):
                stop, stop_tokens = self._answer_end
                config = dataclasses.replace(
                    config, stop=config.stop + stop, stop_tokens=stop_tokens
                )
            prompt = self.tok_encode(context) or [self.prefix_token_id]
            longest = self.max_length - config.max_new_tokens
            if longest < 1:
                raise HymbaError(
                    f"a task asks for {config.max_new_tokens} new tokens, the model's context is "
                    f"{self.max_length}: set a smaller max_gen_toks in the task"
                )
            prompt = prompt[-longest:]
            key = self._answers.key("generate", prompt, dataclasses.asdict(config))
            if config.temperature:
                seen[key] += 1
                config = dataclasses.replace(config, seed=seen[key] - 1)
                key = self._answers.key("generate", prompt, dataclasses.asdict(config))
            keys.append(key)
            if key not in self._answers:
                missing[key] = prompt, config
        self._generate(missing, disable_tqdm)
        results = [str(self._answers[key]) for key in keys]
        for argument, result in zip(arguments, results, strict=True):
            self.cache_hook.add_partial("generate_until", argument, result)
        return results

    @cached_property
    def _answer_end(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        return answer_end(self._model.tokenizer)

    def _generate(self, missing: dict[str, tuple[list[int], SamplingConfig]], quiet: bool) -> None:
        """Computes these, and keeps their answers."""
        by_config: dict[SamplingConfig, list[tuple[str, list[int]]]] = {}
        for key, (prompt, config) in missing.items():
            by_config.setdefault(config, []).append((key, prompt))
        batches: list[tuple[SamplingConfig, tuple[tuple[str, list[int]], ...]]] = []
        for config, jobs in by_config.items():
            jobs.sort(key=lambda job: (len(job[1]), job[1]), reverse=True)
            batches += ((config, batch) for batch in batched(jobs, self._model.batch_size))
        self._compute("generating", _generate_batch, batches, quiet)

    def _compute[Batch](
        self,
        what: str,
        function: Callable[[LanguageModel, Batch], dict[str, Any]],
        batches: Sequence[Batch],
        quiet: bool,
    ) -> None:
        """Keeps the answers to batches of requests, by their keys, as they come."""
        with progress_bar(what, "batches", disable=quiet) as advance:
            for done, answers in enumerate(self._replicas.map(function, batches), 1):
                self._answers.add(answers)
                advance(done, len(batches))

    def _sampling(self, options: Mapping[str, Any]) -> SamplingConfig:
        """The sampling that a task asks for; filters have no effect on greedy decoding."""
        given = dict(normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS))
        if unknown := sorted(given.keys() - set(_GENERATION)):
            raise HymbaError(
                f"a task asks for generation with {unknown[0]} {shown(given[unknown[0]])}, which "
                f"there is not: there are {', '.join(_GENERATION)}"
            )
        sampled = given["do_sample"] and given.get("temperature", 1.0) > 0
        filters = {name: given[name] for name in _FILTERS if name in given}
        return SamplingConfig(
            max_new_tokens=given["max_gen_toks"],
            temperature=given.get("temperature", 1.0) if sampled else 0.0,
            stop=tuple(filter(None, given["until"])),
            repetition_penalty=given.get("repetition_penalty", 1.0),
            **(filters if sampled else {}),
        )


def _score_batch(
    model: LanguageModel, batch: Sequence[tuple[str, tuple[list[int], int]]]
) -> dict[str, tuple[float, bool]]:
    """By key the log-likelihood of a continuation, and whether it is greedy."""
    answers = {}
    scores = model.engine.score([tokens for _, (tokens, _) in batch])
    for (key, (_, count)), score in zip(batch, scores, strict=True):
        continuation = slice(len(score.log_probs) - count, None)
        check_finite("a request", score.log_probs)
        total = float(score.log_probs[continuation].sum(dtype=np.float64))
        answers[key] = total, bool(score.is_likeliest[continuation].all())
    return answers


def _generate_batch(
    model: LanguageModel, batch: tuple[SamplingConfig, Sequence[tuple[str, list[int]]]]
) -> dict[str, str]:
    """By key the completion of a prompt."""
    config, jobs = batch
    completions = model.generate([prompt for _, prompt in jobs], config)
    return {key: each.text for (key, _), each in zip(jobs, completions, strict=True)}


def open_answers(file: str, model: LanguageModel) -> Answers:
    """The answers in a file, which need not exist yet; those of this process without a name.

    Raises:
      HymbaError: the file cannot be written, or holds something else, or is not the same file for
        all processes.
    """
    if not file:
        return Answers()
    path = resolve_path(file)
    check_output_file(path)
    answers = Answers(path, model)
    require_agreement({f"what {file} has answers to": answers.digest})
    return answers


def main() -> None:
    """Runs the harness' own command, which then knows this model."""
    from lm_eval.__main__ import cli_evaluate

    prepare_host()
    silence_orbax()
    use_compilation_cache()
    try:
        cli_evaluate()
    except HymbaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
