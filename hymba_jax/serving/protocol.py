"""Requests and errors of the OpenAI API, as far as it is served.

Fields that would change an answer and are not served are refused, not ignored; where one has a
value that changes nothing, as clients send it, that is accepted. Those of vLLM that OpenAI's API
lacks are `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids` and `structured_outputs`.

No stream is served while pydantic validates a request, so few errors are collected, whatever it
holds: a list or mapping ends at its first, and of the unknown fields of an object one is left.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hymba_jax.config.field_types import shown
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import parse_json

MAX_DEPTH = 64  # of objects and lists in a request's body
MAX_SAMPLES = 128
MAX_STOP_LENGTH = 1000  # characters, as many as may be held back at the end of a text
_StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
type _List[T] = Annotated[list[T], Field(fail_fast=True)]
type _Dict[T] = Annotated[dict[str, T], Field(fail_fast=True)]
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # one way to write each


class ApiError(Exception):
    """An error as the OpenAI API reports it.

    Attributes:
      status: of HTTP.
      message: for people.
      kind: "type" of the error object.
      param: the field that is wrong.
      code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_further_unknown_fields(cls, value: Any) -> Any:
        """Leaves out all unknown fields but the first: each would be an error of its own."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        further = {*[name for name in value if name not in known][1:]}
        return {name: item for name, item in value.items() if name not in further}


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(_Model):
    """What an answer has to follow, as vLLM has it; one of these.

    Attributes:
      json_schema: "json".
      grammar: in Lark's notation.
    """

    json_schema: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    grammar: str | None = None


class GenerationFields(_Model):
    """What completions and chat completions share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: _Dict[float] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    seed: int | None = None
    stop: Annotated[
        _StopString | Annotated[list[_StopString], Field(max_length=16, fail_fast=True)] | None,
        Field(
            description=f"a string of at most {MAX_STOP_LENGTH} characters, or a list of at most 16"
        ),
    ] = None
    stop_token_ids: _List[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None  # names who asks, and changes nothing

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationFields):
    """The body of /v1/completions."""

    prompt: Annotated[
        str | _List[str] | _List[int] | _List[_List[int]],
        Field(description="a string, a list of strings, a list of tokens, or a list of such lists"),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None


class TextPart(_Model):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None  # changes nothing


class FunctionCall(_Model):
    name: str
    arguments: str
    parsed_arguments: Any = None  # what the official client made of them


class AssistantCall(_Model):
    """A tool call of an earlier answer; the index is that of its stream."""

    index: int | None = None
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(_Model):
    """A message of a conversation; assistants may send back all that they got."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | _List[TextPart] | None = None
    name: str | None = None
    tool_calls: _List[AssistantCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None  # where the content is from
    parsed: Any = None  # what the official client made of the content
    audio: None = None
    function_call: None = None


class Function(_Model):
    """A function; `strict` or demanded calls of it follow the schema of its parameters."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Model):
    type: Literal["function"]
    function: Function


class FunctionName(_Model):
    name: str


class ToolChoice(_Model):
    """The one function that is to be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Model):
    """A schema with its name, which changes nothing; it is followed whether `strict` or not."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(GenerationFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: _List[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None
    metadata: _Dict[str] | None = None  # of what is stored
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: _List[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None


def structured_outputs(asked: ChatRequest | CompletionRequest) -> StructuredOutputs | None:
    """What an answer has to follow, if anything.

    Raises:
      ApiError: a response format without its schema, or several things to follow.
    """
    wanted = [asked.structured_outputs] if asked.structured_outputs else []
    form = asked.response_format if isinstance(asked, ChatRequest) else None
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        problem = 'belongs to the type "json_schema"' if form.json_schema else "is missing"
        raise ApiError(400, f"response_format: json_schema {problem}", param="response_format")
    if form is not None and form.type != "text":
        schema = form.json_schema and form.json_schema.json_schema
        wanted.append(
            StructuredOutputs.model_validate(
                {"json": {"type": "object"} if schema is None else schema}
            )
        )
    if sum(len(each.model_dump(exclude_none=True)) for each in wanted) != len(wanted):
        raise ApiError(400, "structured_outputs names not one of json, regex and grammar")
    if len(wanted) > 1:
        raise ApiError(400, "structured_outputs and response_format exclude each other")
    if wanted and isinstance(asked, ChatRequest) and asked.tools and asked.tool_choice != "none":
        raise ApiError(400, "an answer that calls tools cannot follow a grammar", param="tools")
    return wanted[0] if wanted else None


def parse[T: _Model](kind: type[T], body: bytes) -> T:
    """A request from its body.

    Raises:
      ApiError: it is not JSON, or not such a request.
    """
    try:
        value = parse_json(body, strict=True)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    if _depth(value) > MAX_DEPTH:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # Of the types of a union that which fits furthest: an item of a list, not that it is one.
        wrong = max(errors, key=lambda each: len(_place(value, each)))
        place, message = _place(value, wrong), _message(wrong)
        # A name that is half of a UTF-16 pair has no place.
        field = kind.model_fields.get(place[0]) if place else None
        if field and field.description and place[0] in value:
            place, message = place[:1], f"not {field.description}"
        name = ".".join(place)
        raise ApiError(400, f"{name or 'the body'}: {message}", param=name) from error


def sampling_config(
    fields: GenerationFields, defaults: Mapping[str, Any], **others: Any
) -> SamplingConfig:
    """How a request is sampled.

    At temperature 0 the filters and samples that have no effect then are left out.

    Args:
      defaults: what applies where a request names no value.
      others: further fields of the config.

    Raises:
      ApiError: a value is impossible.
    """
    names = (
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("frequency_penalty", "presence_penalty"),
    )
    values = {name: value for name in names if (value := getattr(fields, name)) is not None}
    try:
        # The filters themselves are checked before they are left out.
        SamplingConfig(**{**values, "temperature": values.get("temperature") or 1.0})
        values = {**defaults, **values}
        if values.get("temperature") == 0:
            values = {k: v for k, v in values.items() if k not in ("top_p", "top_k", "min_p")}
        return SamplingConfig(**values, **others)
    except HymbaError as error:
        raise ApiError(400, str(error)) from error


def logit_bias(fields: GenerationFields) -> tuple[tuple[int, float], ...]:
    """Tokens with what is added to their logits. Raises ApiError if a key is no token."""
    biases = fields.logit_bias or {}
    if wrong := [token for token in biases if not _TOKEN_ID.fullmatch(token)]:
        raise ApiError(400, f"logit_bias: {wrong[0][:20]!r} is not a token id", param="logit_bias")
    return tuple((int(token), value) for token, value in biases.items())


def _place(value: Any, error: ErrorDetails) -> list[str]:
    """Where in a request an error is; pydantic's location also names types of unions."""
    parts = []
    for part in error["loc"]:
        try:
            value = value[part]
        except (TypeError, LookupError):
            continue
        parts.append(str(part))
    return [*parts, str(error["loc"][-1])] if error["type"] == "missing" else parts


def _message(error: ErrorDetails) -> str:
    """What is wrong there."""
    match error["type"]:
        case "none_required":
            return "not served"
        case "literal_error" if isinstance(error["input"], bool):
            return "not served"
        case "literal_error":
            return f"{shown(error['input'])} is not served, only {error['ctx']['expected']}"
        case _:
            return error["msg"]


def _depth(value: Any) -> int:
    """Levels of nested objects and lists, MAX_DEPTH + 1 at most."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        depth += 1
    return depth
