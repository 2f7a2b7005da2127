"""A model as the API names it, and its requests as they are submitted."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.inference.tool_calls import END
from hymba_jax.serving.answers import AnswerFormat, ChatFormat, CompletionFormat, Json
from hymba_jax.serving.grammar import Grammar, Grammars
from hymba_jax.serving.messages import (
    argument_schemas,
    forced_beginning,
    template_messages,
    template_tools,
)
from hymba_jax.serving.model_thread import ModelThread
from hymba_jax.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    StructuredOutputs,
    ToolChoice,
    logit_bias,
    sampling_config,
    structured_outputs,
)
from hymba_jax.serving.scheduler import GenerationRequest
from hymba_jax.tokenizer import chat_template

COMPLETION_TOKENS = 16  # of a completion that names no number, as OpenAI has it


@dataclass(frozen=True)
class ApiOptions:
    """What a server allows.

    Attributes:
      api_keys: one of which a request needs; none are needed if there are none.
      max_body: bytes of a request.
      max_tokens: that a request may ask for; as many as fit the context if absent.
      timeout: seconds that a request may take.
    """

    api_keys: tuple[str, ...] = ()
    max_body: int = 4_000_000
    max_tokens: int | None = None
    timeout: float = 600.0


class Prepared(NamedTuple):
    """A request as it is submitted, and how its answer is written."""

    served: "ServedModel"
    requests: list[GenerationRequest]
    answer: AnswerFormat

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


class ServedModel:
    """A model that requests may name.

    Attributes:
      name: in the API.
      thread: that runs it.
    """

    def __init__(self, name: str, thread: ModelThread, options: ApiOptions) -> None:
        self.name, self.thread, self._options = name, thread, options
        self._model = thread.scheduler.model
        self._grammars = Grammars(self._model)
        self._created = int(time.time())
        self._answer_end: tuple[tuple[str, ...], tuple[int, ...]] = ((), ())
        if self._model.tokenizer.chat_template is not None:
            self._answer_end = chat_template.answer_end(self._model.tokenizer)

    @property
    def about(self) -> Json:
        """What the API says of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "hymba_jax",
            "max_model_len": self._model.engine.max_context,
        }

    def prepare_completions(self, asked: CompletionRequest) -> Prepared:
        """A request for completions. Raises HymbaError or ApiError if it is impossible."""
        given: Any = asked.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        allowed = self._options.max_tokens or COMPLETION_TOKENS
        max_tokens = min(COMPLETION_TOKENS, allowed)
        if asked.max_tokens is not None:
            max_tokens = self._max_tokens(asked.max_tokens)
        if max_tokens == 0 and not asked.echo:
            raise ApiError(400, "max_tokens is 0, which needs echo", param="max_tokens")
        if asked.best_of not in (None, asked.n or 1):
            raise ApiError(400, "best_of is served only where it is n", param="best_of")
        prompts = self._model.encode(given, max_new_tokens=max_tokens)
        may_wait = self.thread.scheduler.max_waiting
        if len(prompts) > max(may_wait, 1):
            raise ApiError(
                400,
                f"there are {len(prompts)} prompts, and the server queues at most {may_wait}: "
                "send them in several requests",
                param="prompt",
            )
        # Each prompt's own: without a seed they are as independent as several requests.
        samplings = [self._sampling(asked, max(max_tokens, 1)) for _ in prompts]
        alternatives = asked.logprobs or 0
        grammar = self._grammar(asked)  # compiled once, however many prompts there are
        requests = [
            replace(
                self._request(asked, prompt, sampling, alternatives, grammar),
                scores_prompt=bool(asked.echo) and asked.logprobs is not None,
                is_prompt_only=max_tokens == 0,
            )
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        echoes = [""] * len(prompts)
        if asked.echo:
            decode = self._model.tokenizer.decode
            echoes = [text if isinstance(text, str) else decode(text) for text in given]
        answer = CompletionFormat(
            self._model.tokenizer,
            echoes,
            asked.n or 1,
            log_probs=asked.logprobs is not None,
            has_alternatives=alternatives > 0,
        )
        return Prepared(self, requests, answer)

    def prepare_chat(self, asked: ChatRequest) -> Prepared:
        """A request for an answer. Raises HymbaError or ApiError if it is impossible."""
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
        tools, forced = template_tools(asked), forced_beginning(asked)
        prompt = self._model.encode_chat(template_messages(asked.messages), tools=tools)
        if forced:
            prompt += self._model.tokenizer.encode(forced, parse_special=True)
        is_one_call = isinstance(asked.tool_choice, ToolChoice) or (
            tools is not None and asked.parallel_tool_calls is False
        )
        room = self._model.engine.max_context - len(prompt)
        wanted = asked.max_completion_tokens or asked.max_tokens
        if wanted is None:
            if room < 1:
                raise ApiError(
                    400,
                    f"the conversation has {len(prompt)} tokens, which leaves no room for an "
                    f"answer in the context of {self._model.engine.max_context}",
                    param="messages",
                )
            wanted = min(room, self._options.max_tokens or room)
        stops, stop_tokens = self._answer_end
        sampling = self._sampling(
            asked,
            self._max_tokens(wanted),
            stop=stops + ((END,) if is_one_call else ()),
            stop_tokens=stop_tokens,
        )
        answer = ChatFormat(
            self._model.tokenizer,
            log_probs=bool(asked.logprobs),
            has_tools=tools is not None,
            forced=forced,
            closes_call=is_one_call,
        )
        alternatives, grammar = asked.top_logprobs or 0, self._grammar(asked)
        if schemas := argument_schemas(asked):
            grammar = self._grammars.of_tool_calls(schemas, forced, has_more=not is_one_call)
        return Prepared(
            self, [self._request(asked, prompt, sampling, alternatives, grammar)], answer
        )

    def _max_tokens(self, wanted: int) -> int:
        limit = self._options.max_tokens
        if limit is not None and wanted > limit:
            raise ApiError(
                400, f"max_tokens is {wanted}: the server allows {limit}", param="max_tokens"
            )
        return wanted

    def _sampling(
        self,
        asked: GenerationFields,
        max_new_tokens: int,
        *,
        stop: tuple[str, ...] = (),
        stop_tokens: tuple[int, ...] = (),
    ) -> SamplingConfig:
        given = [name for name, value in asked if value is not None]
        defaults: Mapping[str, Any] = {"temperature": 1.0}  # as OpenAI has it
        if self._model.defaults.applies(given):
            defaults = self._model.defaults.sampling
        strings = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        return sampling_config(
            asked,
            defaults,
            max_new_tokens=max_new_tokens,
            seed=secrets.randbits(32) if asked.seed is None else asked.seed % 2**32,
            stop=strings + stop,
            stop_tokens=(*(asked.stop_token_ids or ()), *stop_tokens),
        )

    def _grammar(self, asked: ChatRequest | CompletionRequest) -> Grammar | None:
        """What the answer has to follow. Raises HymbaError if that is invalid."""
        match structured_outputs(asked):
            case None:
                return None
            case StructuredOutputs(json_schema=dict(schema)):
                return self._grammars.of_json_schema(schema)
            case StructuredOutputs(regex=str(pattern)):
                return self._grammars.of_regex(pattern)
            case StructuredOutputs(grammar=text):
                return self._grammars.of_lark(text or "")

    def _request(
        self,
        asked: ChatRequest | CompletionRequest,
        prompt: list[int],
        sampling: SamplingConfig,
        alternatives: int,
        grammar: Grammar | None,
    ) -> GenerationRequest:
        if grammar is not None:
            ends = (*sampling.stop_tokens, *self._grammars.ends)
            sampling = replace(sampling, stop_tokens=ends)
        return GenerationRequest(
            prompt,
            sampling,
            num_samples=asked.n or 1,
            logit_bias=logit_bias(asked),
            alternatives=alternatives,
            grammar=grammar,
            timeout=self._options.timeout,
        )
