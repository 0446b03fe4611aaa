"""Deep equilibrium models versus bilevel learning, for regularized inverse problems."""

import signal
import sys

if sys.argv[:1] == ["-m"]:
    # A command is being imported: until it has been, Ctrl-C ends it silently.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import resource

    if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < 3e9:
        sys.exit("`ulimit -v` must be unlimited or at least 3000000 for torch and its threads.")
