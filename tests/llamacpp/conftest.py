"""Settings of the llama.cpp tests."""

from __future__ import annotations

import os

# Before libgomp is loaded: waiting threads that spin take seconds from each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
