"""One writer at a time in a directory of a bucket: numbered objects, renewed by their owner.

Stores have no locks. They create an object only if it does not exist, for one of several writers,
and list every object that was written. The holder is whoever created the object of the highest
number; to take over is to create the next one. The holder renews its object; one that does not
change for a while is that of a process that was killed or lost. It has to be watched for that, as
the clocks of two machines may differ. A holder that was cut off so long that another took over
finds the other's object when it reaches the store again, and exits.
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hymba_jax.errors import HymbaError
from hymba_jax.remote import MissingObject, RemotePath

RENEWAL = 10.0  # seconds
EXPIRY = 40.0  # seconds without a renewal


@contextmanager
def locked(lock: RemotePath, writer: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock, and removes it at the end. A process that loses it exits.

    Args:
      lock: directory of the lock's objects, in the directory that is locked.
      writer: what writes there, such as "run".
      say: is told that a lock is watched, which takes up to `EXPIRY` seconds.

    Raises:
      HymbaError: another holds the lock, or the store refuses it.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {now}"
    content = f"{holder}\n{secrets.token_hex(8)}\n"
    number = _acquire(lock, content, writer, say)
    ended = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(lock, number, content, writer, ended), daemon=True
    )
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with suppress(HymbaError):  # it expires
            for below in _numbers(lock) & {*range(number + 1)}:
                (lock / str(below)).unlink()


def _acquire(lock: RemotePath, content: str, writer: str, say: Callable[[str], None]) -> int:
    """The number of the object that was created."""
    while True:
        seen = _numbers(lock)  # those below the newest were left by earlier holders, killed too
        newest = max(seen, default=0)
        if newest == 0 or _has_expired(lock / str(newest), writer, say):
            break
    own = lock / str(newest + 1)
    if not own.create(content.encode()) and own.read_bytes() != content.encode():
        raise _taken(lock, writer, _holder(own.read_bytes()))
    if others := _numbers(lock) - seen - {newest + 1}:  # created since that listing
        own.unlink()
        raise _taken(lock, writer, _holder((lock / str(max(others))).read_bytes()))
    return newest + 1


def _has_expired(held: RemotePath, writer: str, say: Callable[[str], None]) -> bool:
    """Watches an object that may be renewed; False if it is removed.

    Raises:
      HymbaError: it is renewed.
    """
    try:
        content = held.read_bytes()
        say(
            f"{held.parent.parent}: waiting up to {EXPIRY:.0f} s to see whether the {writer} there "
            f"has died ({_holder(content)})"
        )
        deadline = time.monotonic() + EXPIRY
        while time.monotonic() < deadline:
            time.sleep(RENEWAL / 2)
            if held.read_bytes() != content:
                raise _taken(held.parent, writer, _holder(content))
    except MissingObject:
        return False
    return True


def _renew(
    lock: RemotePath, number: int, content: str, writer: str, ended: threading.Event
) -> None:
    renewals = 0
    while not ended.wait(RENEWAL):
        # Without the store there is nothing to renew, and nothing else can be written either.
        with suppress(HymbaError):
            if max(_numbers(lock), default=0) != number:
                _exit(f"{lock.parent}: another {writer} took over: this one was cut off too long")
            renewals += 1
            (lock / str(number)).write_bytes(f"{content}renewed {renewals} times\n".encode())


def _exit(message: str) -> None:
    """Ends the process at once, as if it was killed: nothing more is written."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _numbers(lock: RemotePath) -> set[int]:
    return {int(path.name) for path in lock.iterdir() if path.name.isdecimal()}


def _holder(content: bytes) -> str:
    return content.decode(errors="replace").partition("\n")[0]


def _taken(lock: RemotePath, writer: str, holder: str) -> HymbaError:
    return HymbaError(
        f"{lock.parent}: a {writer} is writing there ({holder}): wait for it, stop it, or choose "
        "another output"
    )
