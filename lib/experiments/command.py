"""Command lines with `-p NAME VALUE`; errors end in one line, Ctrl-C and closed pipes without a traceback."""

from __future__ import annotations

import argparse
import os
import re
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
        """Return the options, with a list of names and values for each of `flags`, such as `p` for `-p`."""
        # By default argparse reads `-1e-5` as an option.
        self._negative_number_matcher = re.compile(r"-[.\d]")
        for flag in flags:
            self.add_argument(flag, nargs="*", action="append", default=[], metavar="NAME VALUE")
        options = self.parse_args(arguments)
        for flag in flags:
            for words in getattr(options, flag.lstrip("-")):
                if len(words) < 2:
                    raise ConfigError(f"`{(words or [flag])[0]}` must have a value: {flag} NAME VALUE.")
                if len(words) > 2:
                    raise ConfigError(f"`{words[0]}` must be one value; quote it: '{' '.join(words[1:])}'.")
        return options


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
            return fail(STOPPED, "interrupted; run the same command again to resume")
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
