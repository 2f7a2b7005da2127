"""Tool calling learned by fine-tuning, on this machine: full SFT, LoRA and DoRA at equal steps.

    python benchmarks/tool_calls.py [--model runs/tiny]

Conversations are generated: a user asks in one of several ways for one of four tools, and the
answer calls it. The models are asked with arguments that are in no conversation of training; a call
counts if its name and all of its arguments are right. Runs are resumed if they are there.
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

type Question = tuple[str, ToolCall]


@dataclass(frozen=True)
class Args:
    """Trains and asks.

    Attributes:
      model: a run or a model whose tokenizer has no chat template, such as the demo's.
      output: where conversations and runs are written.
      steps: of each run.
      conversations: of training.
      questions: with unseen arguments.
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
    file.write_text("".join(conversation(ask(seen, rng)) for _ in range(args.conversations)))
    questions = [ask(unseen, rng) for _ in range(args.questions)]
    rows = [measured("untuned", args.model, questions, 0.0)]
    for name, (adapter, learning_rate) in METHODS.items():
        output = str(args.output / name.replace(" ", "-").lower())
        start = time.perf_counter()
        train(run_of(args, file, output, adapter, learning_rate))
        rows.append(measured(name, output, questions, time.perf_counter() - start))
    report(f"tool calls with unseen arguments, {args.steps} steps", rows, args.json)


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


def measured(name: str, model: str, questions: list[Question], seconds: float) -> Row:
    """How many of the questions a model answers with the right call."""
    tokenizer = Tokenizer.load(model).with_chat_template_of(TEMPLATE)
    asked = LanguageModel(load_model(model), tokenizer, batch_size=32)
    prompts = [asked.encode_chat(messages(text), tools=TOOLS) for text, _ in questions]
    answers = asked.generate(prompts, max_new_tokens=64)
    right = [
        called(answer.text) == [call] for answer, (_, call) in zip(answers, questions, strict=True)
    ]
    return {"model": name, "right calls": sum(right) / len(right), "seconds": seconds}


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


def ask(values: Values, rng: random.Random) -> Question:
    """A question, and the call that answers it."""
    chosen = rng.choice(TOOLS)
    parameters = chosen["parameters"]["properties"]
    arguments = {name: values(spec["type"], rng) for name, spec in parameters.items()}
    return rng.choice(WAYS[chosen["name"]]).format(**arguments), ToolCall(chosen["name"], arguments)


def messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def conversation(question: Question) -> str:
    """A line of the file: the question, and the answer that calls the tool."""
    text, call = question
    answer = {"role": "assistant", "content": "", "tool_calls": [call._asdict()]}
    return json.dumps({"messages": [*messages(text), answer], "tools": TOOLS}) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args))
