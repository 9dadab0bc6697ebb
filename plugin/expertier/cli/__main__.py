"""``python -m expertier.cli``."""

from expertier.cli import main

main()
