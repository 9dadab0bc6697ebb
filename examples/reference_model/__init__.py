"""A small mixture of experts trained on this machine, widened without changing what it computes."""

import os

# Must be known before torch loads its thread pool. By default threads spin while they wait for each other, which on a
# machine that does something else at the same time slowed training down more than tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
