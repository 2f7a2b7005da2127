"""Texts to token ids on all cores, in order and in bounded memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from hymba_jax.closing import Closing
from hymba_jax.data.megatron import token_dtype
from hymba_jax.errors import HymbaError
from hymba_jax.host import host_memory
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.tokenizer.answers import ChatText, encode_answers
from hymba_jax.types import Bool, Int, UInt

# Characters that are tokenized together, unless one text has more: about a second's work.
_BATCH = 1 << 20
# What tokenizing takes at once for each character (measured: 150 bytes), and the share of the
# host's memory that it may take; a piece of a document, 16 Mi characters, is never too much.
_BYTES_PER_CHARACTER = 150
_SHARE = 1 / 4
_LONGEST = 1 << 24
# Bytes of files, as they are stored, that are tokenized sooner than worker processes are started.
_SMALL = 1 << 23

type Ids = UInt[np.ndarray, " _"] | Int[np.ndarray, " _"]
"""Token ids of `token_dtype`."""


type Text = str | ChatText
"""All of it ordinary text, or a conversation, whose template writes control tokens."""


class Encoded(NamedTuple):
    """A text as token ids, and its UTF-8 bytes.

    Attributes:
      ids: without any before or after it, of a conversation with the token that has to follow.
      mask: of a conversation whether the loss is on each token; None of other text.
    """

    ids: Ids
    text_bytes: int
    mask: Bool[np.ndarray, " _"] | None = None


class _EncodedBatch(NamedTuple):
    """Several texts, one behind another: few objects to send between processes."""

    ids: Ids
    ends: list[int]
    text_bytes: list[int]
    mask: Bool[np.ndarray, " _"] | None = None

    def texts(self) -> Iterator[Encoded]:
        """Each of them."""
        for start, end, text_bytes in zip(
            [0, *self.ends[:-1]], self.ends, self.text_bytes, strict=True
        ):
            mask = None if self.mask is None else self.mask[start:end]
            yield Encoded(self.ids[start:end], text_bytes, mask)


def default_workers(size: int) -> int:
    """How many processes tokenize so many bytes of files."""
    if size <= _SMALL:
        return 1
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Encoder(Closing):
    """Tokenizes in worker processes, as a context.

    One worker is this very process, with the threads of the tokenizers library. The others are
    forked by a server that has imported this module and runs no threads.

    Args:
      workers: how many processes.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer, self._workers = tokenizer, workers
        self._pool: ProcessPoolExecutor | None = None

    def encode[T](self, texts: Iterable[tuple[Text, T]]) -> Iterator[tuple[Encoded, T]]:
        """Each text as token ids, with what came beside it.

        All are conversations, or none is.

        Texts are read ahead of what is returned: two batches of about a million characters for
        each process, or fewer if they are so long that tokenizing all of them at once would take
        more than a quarter of the host's memory.

        Raises:
          HymbaError: the tokenizer fails, or a worker process has died.
        """
        if self._pool is None:
            for batch, tags in _batches(texts):
                yield from zip(_encode(self._tokenizer, batch).texts(), tags, strict=True)
            return
        try:
            yield from self._encode_in_pool(self._pool, texts)
        except BrokenProcessPool as error:
            raise HymbaError(
                "a worker process has died, perhaps of too little memory: run the same command "
                "again to resume; fewer --workers take less memory"
            ) from error

    def _encode_in_pool[T](
        self, pool: ProcessPoolExecutor, texts: Iterable[tuple[Text, T]]
    ) -> Iterator[tuple[Encoded, T]]:
        under_way: deque[tuple[Future[_EncodedBatch], list[T], int]] = deque()
        limit = max(_LONGEST, int(host_memory() * _SHARE / _BYTES_PER_CHARACTER))
        size = 0
        for batch, tags in _batches(texts):
            characters = sum(map(len, batch))
            while under_way and (len(under_way) >= 2 * self._workers or size + characters > limit):
                future, done, released = under_way.popleft()
                size -= released
                yield from zip(future.result().texts(), done, strict=True)
            under_way.append((pool.submit(_encode_in_worker, batch), tags, characters))
            size += characters
        while under_way:
            future, done, _ = under_way.popleft()
            yield from zip(future.result().texts(), done, strict=True)

    def __enter__(self) -> "Encoder":
        if self._workers > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self._pool = ProcessPoolExecutor(
                self._workers, context, _start_worker, (self._tokenizer,)
            )
        return self

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _batches[T](texts: Iterable[tuple[Text, T]]) -> Iterator[tuple[list[Text], list[T]]]:
    """Texts of about _BATCH characters together, and what came beside them."""
    batch: list[Text] = []
    tags: list[T] = []
    size = 0
    for text, tag in texts:
        batch.append(text)
        tags.append(tag)
        size += len(text)
        if size >= _BATCH:
            yield batch, tags
            batch, tags, size = [], [], 0
    if batch:
        yield batch, tags


def _encode(tokenizer: Tokenizer, texts: list[Text]) -> _EncodedBatch:
    chats = [text for text in texts if isinstance(text, ChatText)]
    plain = [text for text in texts if isinstance(text, str)]
    ids, masks = tokenizer.encode_batch(plain), []
    for chat in chats:
        chat_ids, mask = encode_answers(tokenizer, chat)
        end = [tokenizer.eos_id] * chat.takes_eos
        ids.append([*chat_ids, *end])
        masks.append(np.append(mask, np.ones(len(end), bool)))
    ends = list(accumulate(map(len, ids)))
    return _EncodedBatch(
        ids=np.fromiter(chain.from_iterable(ids), token_dtype(tokenizer.vocab_size), ends[-1]),
        ends=ends,
        text_bytes=[len(text.encode()) for text in plain or [chat.text for chat in chats]],
        mask=np.concatenate(masks) if masks else None,
    )


# --- In a worker process ---

_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent is killed, which an idle worker would not notice."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[Text]) -> _EncodedBatch:
    return _encode(_worker_tokenizer, texts)
