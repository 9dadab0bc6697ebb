"""The ``expertier`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the entry point of the package. Never shows a traceback for what it refuses on purpose."""
    try:
        from expertier.cli.app import app

        app()
    except KeyboardInterrupt:  # inside a command it is handled there; this is for the moments around it
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
