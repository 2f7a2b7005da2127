"""Tokenizing that is killed again and again, and goes on each time."""

import random

from hymba_jax.data.tokenize_progress import ProgressLine


class Killed(BaseException):
    pass


def tokenize_interrupted(tokenize, output, monkeypatch, chance, when_killed=lambda stops: None):
    """Tokenizes until the manifest is there; how often it was killed.

    Args:
      tokenize: begins it, or goes on.
      chance: of being killed, each time that progress is shown.
      when_killed: is called with the number of times so far.
    """

    def interrupt(self, progress):
        if rng.random() < chance:
            raise Killed

    rng, stops = random.Random(1), 0
    with monkeypatch.context() as patched:
        patched.setattr(ProgressLine, "show", interrupt)
        while not (output / "manifest.json").exists():
            try:
                tokenize()
            except Killed:
                stops += 1
                when_killed(stops)
    return stops
