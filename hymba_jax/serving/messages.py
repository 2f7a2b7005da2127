"""Messages of the OpenAI API, as chat templates read them."""

from collections.abc import Iterator, Sequence
from typing import Any

from hymba_jax.files import parse_json_object
from hymba_jax.inference.tool_calls import START, call_beginning
from hymba_jax.serving.protocol import (
    ApiError,
    AssistantCall,
    ChatRequest,
    Function,
    Message,
    ToolChoice,
)


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages for a chat template.

    Developers' are the system's, parts of a content are joined, and arguments of tool calls are
    objects, not text.

    Raises:
      ApiError: arguments are not a JSON object.
    """
    return [_template_message(i, message) for i, message in enumerate(messages)]


def template_tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the template shows the model, unless it may call none.

    Raises:
      ApiError: two have the same name.
    """
    if not request.tools or request.tool_choice == "none":
        return None
    names = [tool.function.name for tool in request.tools]
    if len({*names}) < len(names):
        raise ApiError(400, f"two of the tools {', '.join(names)} have one name", param="tools")
    hidden = {"function": {"strict"}}  # which is about how answers are sampled
    return [tool.model_dump(exclude_unset=True, exclude=hidden) for tool in request.tools]


def forced_beginning(request: ChatRequest) -> str:
    """What the answer must begin with for the call that `tool_choice` demands; often empty.

    Raises:
      ApiError: there is no such tool.
    """
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return ""
    names = [tool.function.name for tool in request.tools or ()]
    if not names:
        raise ApiError(400, "tool_choice demands a call, but there are no tools", param="tools")
    if not isinstance(choice, ToolChoice):
        return START
    if choice.function.name not in names:
        raise ApiError(
            400, f"tool_choice: there is no tool {choice.function.name!r}", param="tool_choice"
        )
    return call_beginning(choice.function.name)


def argument_schemas(request: ChatRequest) -> dict[str, dict[str, Any]]:
    """What the arguments of each tool have to follow, by its name; empty if nothing has to.

    All have to follow their schemas in a call that is demanded, those of strict tools in any.
    """
    choice = request.tool_choice
    functions = [tool.function for tool in request.tools or ()]
    if isinstance(choice, ToolChoice):
        functions = [each for each in functions if each.name == choice.function.name]
    is_demanded = choice not in (None, "none", "auto")
    if choice == "none" or not (is_demanded or any(each.strict for each in functions)):
        return {}
    return {
        each.name: _parameters(each) if is_demanded or each.strict else {} for each in functions
    }


def _parameters(function: Function) -> dict[str, Any]:
    """The schema of a function's parameters; without one it has none."""
    if function.parameters is None:
        return {"properties": {}, "additionalProperties": False}
    return function.parameters


def _template_message(index: int, message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    fields = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content,
        "name": message.name,
        "tool_calls": [*_template_calls(f"messages.{index}", message.tool_calls or ())] or None,
        "tool_call_id": message.tool_call_id,
    }
    if content is None and not message.tool_calls:
        raise ApiError(400, f"messages.{index}: there is no content", param=f"messages.{index}")
    return {name: value for name, value in fields.items() if value is not None}


def _template_calls(place: str, calls: Sequence[AssistantCall]) -> Iterator[dict[str, Any]]:
    for call in calls:
        try:
            arguments = parse_json_object(call.function.arguments)
        except ValueError as error:
            raise ApiError(
                400, f"{place}: arguments of a tool call are not a JSON object", param=place
            ) from error
        function = {"name": call.function.name, "arguments": arguments}
        yield {"id": call.id, "type": "function", "function": function}
