"""What of a record is the document, by the format that a config names."""

from hymba_jax.config.data import Format, LossOn
from hymba_jax.data.conversations import Conversations
from hymba_jax.data.preferences import Preferences
from hymba_jax.data.records import Content
from hymba_jax.data.text_field import TextField
from hymba_jax.tokenizer import Tokenizer


def make_content(
    format: Format,
    text_field: str,
    loss_on: LossOn,
    tokenizer: Tokenizer | None,
    template: str,
) -> Content:
    """The content of records of a format.

    Args:
      text_field: of text, the field or column that holds it.
      loss_on: of conversations and pairs, as `DataConfig` has it.
      tokenizer: renders conversations; without one, all records are text.
      template: where its chat template is from, for messages.

    Raises:
      HymbaError: the tokenizer has no chat template, or one whose answers cannot be told.
    """
    if tokenizer is None or format == "text":
        return TextField(text_field)
    kind = Conversations if format == "chat" else Preferences
    return kind(tokenizer, loss_on, template)
