"""Run mixture-of-experts models that are bigger than memory, inside the engine you already use.

Importing this package is cheap and imports no engine; the work lives in its subpackages.
"""

__version__ = "0.1.0"
