"""Tool calling and role play by fine-tuning, on this machine: full SFT, LoRA, DoRA at equal steps.

    python benchmarks/tool_calls.py [--model runs/tiny]

Conversations are generated. In one half a user asks in one of several ways for one of four tools,
and the answer calls it; in the other the system message names one of three characters, who answers
in his manner, with the user's name. The models are asked with arguments and names that are in no
conversation of training; a call counts if its name and all of its arguments are right, a line of a
character if every letter is. Runs are resumed if they are there.
"""

import itertools
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from _report import Row, report

from hymba_jax.checkpoint.load import load_model
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.data import DataConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.host import prepare_host
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.tool_calls import ToolCall, parse_tool_calls
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.train import train

TEMPLATE = "configs/chat.jinja"
SYLLABLES = ("ba", "den", "ki", "lo", "mar", "no", "pe", "ri", "sun", "ta", "vel", "zo")

type Conversation = dict[str, Any]
"""A record: messages of which the last is the answer, and perhaps tools."""


@dataclass(frozen=True)
class Args:
    """Trains and asks.

    Attributes:
      model: a run or a model whose tokenizer has no chat template, such as the demo's.
      output: where conversations and runs are written.
      steps: of each run.
      conversations: of training.
      questions: with unseen arguments, and as many for the characters.
      json: file for the rows as JSON lines.
    """

    model: str = "runs/tiny"
    output: Path = Path("runs/tool_calls")
    steps: int = 200
    conversations: int = 4000
    questions: int = 200
    json: Path | None = None


METHODS = {
    "full SFT": (AdapterConfig(), 1e-3),
    "LoRA": (AdapterConfig("lora", rank=16, alpha=16.0), 1e-2),
    "DoRA": (AdapterConfig("dora", rank=16, alpha=16.0), 1e-2),
}
"""How each is trained, and its learning rate."""


def main(args: Args) -> None:
    prepare_host()
    seen, unseen = split_values()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "conversations.jsonl"
    rng = random.Random(0)
    made = (
        (call_a_tool, play_a_role)[number % 2](seen, rng) for number in range(args.conversations)
    )
    file.write_text("".join(json.dumps(conversation) + "\n" for conversation in made))
    calls = [call_a_tool(unseen, rng) for _ in range(args.questions)]
    lines = [play_a_role(unseen, rng) for _ in range(args.questions)]
    rows = [measured("untuned", args.model, calls, lines, 0.0)]
    for name, (adapter, learning_rate) in METHODS.items():
        output = str(args.output / name.replace(" ", "-").lower())
        start = time.perf_counter()
        train(run_of(args, file, output, adapter, learning_rate))
        rows.append(measured(name, output, calls, lines, time.perf_counter() - start))
    report(f"unseen arguments and names, {args.steps} steps", rows, args.json)


def run_of(
    args: Args, file: Path, output: str, adapter: AdapterConfig, learning_rate: float
) -> RunConfig:
    """The run that fine-tunes the model on the conversations."""
    return RunConfig(
        output=output,
        init_from=args.model,
        model=load_model(args.model).config,
        adapter=adapter,
        data=DataConfig(
            path=str(file),
            tokenizer=args.model,
            format="chat",
            chat_template=TEMPLATE,
            sequence_length=320,  # one conversation, most of which are the tools
            packing="documents",
            validation_packing="documents",
        ),
        training=TrainingConfig(
            steps=args.steps,
            batch_size=8,
            learning_rate=learning_rate,
            schedule="cosine",
            weight_decay=0.0,
            log_every=20,
            validate_every=100,
            checkpoint_every=100,
            sample_tokens=0,
        ),
    )


def measured(
    name: str, model: str, calls: list[Conversation], lines: list[Conversation], seconds: float
) -> Row:
    """How many of the conversations' answers a model gives."""
    tokenizer = Tokenizer.load(model).with_chat_template_of(TEMPLATE)
    asked = LanguageModel(load_model(model), tokenizer, batch_size=32)

    def share(conversations: list[Conversation], is_right: Callable[[str, Any], bool]) -> float:
        prompts = [
            asked.encode_chat(each["messages"][:-1], tools=each.get("tools"))
            for each in conversations
        ]
        answers = asked.generate(prompts, max_new_tokens=64)
        wanted = (each["messages"][-1] for each in conversations)
        return sum(map(is_right, (answer.text for answer in answers), wanted)) / len(prompts)

    return {
        "model": name,
        "right calls": share(calls, lambda text, wanted: called(text) == calls_of(wanted)),
        "right lines": share(lines, lambda text, wanted: text == wanted["content"]),
        "seconds": seconds,
    }


def calls_of(message: dict[str, Any]) -> list[ToolCall]:
    return [ToolCall(**call) for call in message["tool_calls"]]


def called(answer: str) -> list[ToolCall]:
    try:
        return parse_tool_calls(answer)[1]
    except HymbaError:
        return []


def tool(name: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return {"name": name, "parameters": {"type": "object", "properties": properties}}


TOOLS = [
    tool("weather", city="string"),
    tool("timer", minutes="integer"),
    tool("add", a="integer", b="integer"),
    tool("call", person="string", minutes="integer"),
]

WAYS: dict[str, tuple[str, ...]] = {
    "weather": ("What is the weather in {city}?", "Is it raining in {city}?", "{city}: weather"),
    "timer": ("Wake me in {minutes} minutes.", "Set a timer of {minutes} minutes"),
    "add": ("What is {a} plus {b}?", "Add {a} and {b}", "{a} + {b} = ?"),
    "call": ("Call {person} in {minutes} minutes", "In {minutes} minutes, ring {person}."),
}

type Values = Callable[[str, random.Random], Any]


def split_values() -> tuple[Values, Values]:
    """Arguments for training, and others for the questions: one in five names and numbers."""
    names = [a + b + c for a, b, c in itertools.product(SYLLABLES, repeat=3)]
    sides: list[dict[str, list[Any]]] = [{}, {}]
    for kind, values in (("string", names), ("integer", [*range(1, 1000)])):
        shuffled: list[Any] = random.Random(1).sample(values, len(values))
        cut = len(shuffled) // 5
        sides[0][kind], sides[1][kind] = shuffled[cut:], shuffled[:cut]

    def chooser(side: dict[str, list[Any]]) -> Values:
        def choose(kind: str, rng: random.Random) -> Any:
            value = rng.choice(side[kind])
            return value.title() if kind == "string" else value

        return choose

    seen, unseen = map(chooser, sides)
    return seen, unseen


def call_a_tool(values: Values, rng: random.Random) -> Conversation:
    """A user asks for a tool, and the answer calls it."""
    chosen = rng.choice(TOOLS)
    parameters = chosen["parameters"]["properties"]
    arguments = {name: values(spec["type"], rng) for name, spec in parameters.items()}
    asked = rng.choice(WAYS[chosen["name"]]).format(**arguments)
    call = {"name": chosen["name"], "arguments": arguments}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": asked}, answer], "tools": TOOLS}


CHARACTERS = {
    "You are a pirate.": "Arr, {name}! {what} are for the lubbers, I say.",
    "You are a butler.": "Very good, {name}. I shall see to the {what} at once.",
    "You are a robot.": "UNIT {name} REGISTERED. {what}: NO DATA.",
}
WISHES = ("letters", "apples", "lamps", "boots", "maps")


def play_a_role(values: Values, rng: random.Random) -> Conversation:
    """A character answers a user, who says a name."""
    character, line = rng.choice([*CHARACTERS.items()])
    said = {"name": values("string", rng), "what": rng.choice(WISHES)}
    return {
        "messages": [
            {"role": "system", "content": character},
            {"role": "user", "content": "I am {name}. Bring me the {what}.".format(**said)},
            {"role": "assistant", "content": line.format(**said)},
        ]
    }


if __name__ == "__main__":
    main(tyro.cli(Args))
