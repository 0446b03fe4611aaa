"""Deep equilibrium models versus bilevel learning, for regularized inverse problems."""

import signal
import sys

# While a command is being imported, Ctrl-C ends it silently.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
