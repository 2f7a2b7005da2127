"""Tasks of lm-evaluation-harness: its own, those of a directory, and the paper's task lists."""

import difflib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.harness import HarnessModel
from hymba_jax.files import read_text, replace_text, resolve_path

# After the harness module, which says how to install it.
from lm_eval.evaluator import simple_evaluate  # isort: skip
from lm_eval.tasks import TaskManager  # isort: skip
from lm_eval.utils import handle_non_serializable, make_table  # isort: skip

GROUPS = Path(__file__).parent / "task_groups"
"""The paper's task lists."""


class Tasks(TaskManager):
    """The harness' tasks, whose errors are ours, and which are loaded once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._loaded: dict[tuple[str, ...], Any] = {}

    def load(self, task_list: Sequence[str]) -> Any:
        """As the harness has it.

        Raises:
          HymbaError: what a task's YAML file or its documents are wrong for, which the harness
            shows in exceptions of all kinds.
        """
        key = tuple(task_list)
        if key not in self._loaded:
            try:
                self._loaded[key] = super().load([*key])
            except Exception as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else "it has no documents"
                raise HymbaError(
                    f"tasks {', '.join(key)} cannot be loaded ({reason}): {_advice(error)}"
                ) from error
        return self._loaded[key]


def _advice(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name}"
    if str(error).startswith("Duplicate task"):
        return "evaluate them one after another, with one file of answers"
    return "check their YAML files and their data"


def load_tasks(
    names: Sequence[str], include_path: str = "", num_fewshot: int | None = None
) -> tuple[Tasks, list[str]]:
    """Loads tasks of the harness, of the paper's lists or of a directory, with their documents.

    Args:
      names: of tasks or groups, or patterns such as `mmlu_*` for all names that match.
      num_fewshot: examples before each question; as each task says if absent.

    Returns:
      All tasks, and the names of those that are asked for.

    Raises:
      HymbaError: there is no such directory, a YAML file of it is broken, a task is nowhere or
        cannot be loaded, takes no examples, or runs code that a model writes.
    """
    paths = [GROUPS]
    if include_path:
        paths.append(resolve_path(include_path))
        if not paths[-1].is_dir():
            raise HymbaError(f"{include_path}: no directory with the YAML files of tasks")
    manager = Tasks(include_path=paths)
    for name in names:
        if not manager.match_tasks([name]):
            _check_syntax(paths[1:])
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f", did you mean {', '.join(near)}?" if near else ""
            raise HymbaError(f"no task {name!r}{hint or ': see `lm_eval ls tasks`'}")
    found = manager.match_tasks([*names])
    for name, task in manager.load(found)["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise HymbaError(f"task {name} runs the code that a model writes: leave it out")
        if num_fewshot and "doc_to_text" not in inspect.signature(task.doc_to_text).parameters:
            raise HymbaError(f"task {name} takes no examples: leave num_fewshot out for it")
    return manager, found


def _check_syntax(directories: Sequence[Path]) -> None:
    """Refuses YAML files that are broken, which the harness leaves out."""
    for directory in directories:
        for file in sorted(directory.rglob("*.yaml")):
            try:
                yaml.compose(read_text(file))
            except yaml.YAMLError as error:
                raise HymbaError(f"{file}: not a YAML file ({error})") from error


def run_tasks(
    model: HarnessModel,
    names: Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int = 0,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """What the harness' `simple_evaluate` returns, without samples.

    Args:
      num_fewshot: examples before each question; as each task says if absent.
      limit: the first documents of each task only; all if 0.
      apply_chat_template: questions and examples are messages of a conversation.

    Raises:
      HymbaError: the model cannot do what a task asks for.
    """
    results: dict[str, Any] = simple_evaluate(
        model,
        tasks=[*names],
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit or None,
        apply_chat_template=apply_chat_template,
        log_samples=False,
    )
    return results


def tables(results: dict[str, Any]) -> str:
    """The metrics of each task, and of each group that has some, as Markdown."""
    columns = ["results", *(["groups"] if results.get("groups") else [])]
    return "\n".join(make_table(results, column) for column in columns)


def write_results(results: dict[str, Any], path: Path) -> None:
    """Writes the results as JSON, atomically."""
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    replace_text(path, text + "\n")
