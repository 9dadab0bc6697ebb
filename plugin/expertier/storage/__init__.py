"""Reading experts from storage: direct files and prioritised I/O threads."""

from expertier.storage.files import PAGE, IoMode, StorageFile
from expertier.storage.scheduler import (
    BACKGROUND,
    DEMAND,
    PREFETCH,
    Completion,
    IoScheduler,
    ReadQueue,
    ReadRequest,
    Transfer,
)

__all__ = [
    "BACKGROUND",
    "DEMAND",
    "PAGE",
    "PREFETCH",
    "Completion",
    "IoMode",
    "IoScheduler",
    "ReadQueue",
    "ReadRequest",
    "StorageFile",
    "Transfer",
]
