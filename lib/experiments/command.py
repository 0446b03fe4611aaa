"""Command lines with `-p NAME VALUE`; errors end in one line, Ctrl-C and closed pipes without a traceback."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NoReturn

from lib.experiments.config import ConfigError

STOPPED = 130
"""Exit status after Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """Parser of options with a name and a value, whose errors are `ConfigError`s."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse(self, arguments: Sequence[str] | None, *flags: str) -> argparse.Namespace:
        """Return the options, with a list of names and values for each of `flags`, such as `p` for `-p`.

        argparse alone would read `-1e-5` as an option.
        """
        words, rest = list(sys.argv[1:] if arguments is None else arguments), list[str]()
        pairs: dict[str, list[tuple[str, str]]] = {flag.lstrip("-"): [] for flag in flags}

        def operand() -> str | None:
            return None if not words or words[0] in flags or words[0].startswith("--") else words.pop(0)

        while words:
            rest.append(words.pop(0))
            if rest[-1] in flags:
                flag, name, value, more = rest.pop(), operand(), operand(), operand()
                if name is None or value is None:
                    raise ConfigError(f"`{name or flag}` must have a value: {flag} NAME VALUE.")
                if more is not None:
                    raise ConfigError(f"`{name}` must be one value; quote it: '{value} {more}'.")
                pairs[flag.lstrip("-")].append((name, value))
        return argparse.Namespace(**vars(self.parse_args(rest)), **pairs)


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Decorate a command to return its exit status, also after errors and Ctrl-C."""

    @wraps(main)
    def ended(arguments: list[str] | None = None) -> int:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            status = main(arguments)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return fail(STOPPED, "stopped; the same command goes on from here")
        except BrokenPipeError:
            # The reader, such as `head`, has closed the pipe; discard what Python writes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (ConfigError, OSError, RuntimeError) as error:
            return fail(2 if isinstance(error, ConfigError) else 1, " ".join(str(error).split()))
        return status

    return ended


def fail(status: int, line: str) -> int:
    """Print a line to stderr and return the exit status."""
    print(line, file=sys.stderr)
    return status
