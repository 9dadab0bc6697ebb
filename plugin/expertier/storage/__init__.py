"""Reading experts from storage: direct files and prioritised I/O threads."""

from expertier.storage.files import PAGE, IoMode, StorageFile
from expertier.storage.scheduler import BACKGROUND, DEMAND, PREFETCH, IoScheduler, ReadRequest, Transfer

__all__ = [
    "BACKGROUND",
    "DEMAND",
    "PAGE",
    "PREFETCH",
    "IoMode",
    "IoScheduler",
    "ReadRequest",
    "StorageFile",
    "Transfer",
]
