"""The one exception that is for people."""


class HymbaError(Exception):
    """Something a person can mend: what was wrong, where, and what to do, in one line.

    Commands print it and exit with status 1, without a traceback.
    """
