"""Deep equilibrium models versus bilevel learning, for regularized inverse problems."""

import os

# Threads that wait for each other in a busy loop starve whatever else runs on the machine, and each
# other: two trainings at once on two cores were ten times slower than with this. It has to be set
# before torch loads its OpenMP runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
