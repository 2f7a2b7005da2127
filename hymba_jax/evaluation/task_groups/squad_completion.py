"""SQuAD-C behind an example, which the harness' task does not take."""

from typing import Any

from lm_eval.tasks.squad_completion.task import SQUADCompletion


class OneExample(SQUADCompletion):
    """The harness' task with another document and its answer before each (Tab. 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.set_config("num_fewshot", 1)

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        return str(super().doc_to_text(doc))

    def doc_to_target(self, doc: dict[str, Any], doc_to_target: Any = None) -> str:
        return str(super().doc_to_target(doc))
