"""Settings of the end-to-end tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see tests/llamacpp/conftest.py
