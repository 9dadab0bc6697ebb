"""The sidecar file: experts of a model in another layout, page aligned, each with a checksum.

An engine may compute faster on rearranged weights than on those of the model file. Rearranging at every load of an
expert is too slow, so it is done once and the result is kept in a file of this format. What the layout is, this module
does not know: it stores bytes under a key and gives them back only for the same key.

Format, version 1; all numbers little-endian:

====================  =================================================================================================
bytes                 what
====================  =================================================================================================
0..8                  magic ``EXPTPACK``
8..12                 version, uint32
12..16                number of checksums, uint32
16..24                bytes of the JSON text, uint64
24..32                offset of the first expert, uint64
32..40                size of the file, uint64
40..72                BLAKE2b-256 of everything before the first expert, these 32 bytes taken as zeros
72..                  JSON text: ``key`` (``model``, ``content``, ``layout``, ``library``) and ``parts``, each with
                      ``name``, ``layer``, ``role``, ``type``, ``shape``, ``offset``, ``expert_bytes``, ``padded_bytes``
then                  one uint32 per expert, in the order of the experts in the file: its :func:`checksum`
then                  zeros up to a multiple of 4096
then                  the experts, part by part: expert ``e`` at ``offset + e * padded_bytes``, and both ``offset``
                      and ``padded_bytes`` are multiples of 4096
====================  =================================================================================================

The header is written last, so a file whose writer died is no pack, whatever its name; and it is written under another
name and renamed, so nobody meets such a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from expertier.budget import format_bytes
from expertier.catalog.types import ExpertPart, LayerExperts
from expertier.errors import SidecarError

__all__ = ["SUFFIX", "Pack", "PackKey", "PieceCheck", "build_pack", "checksum", "find_or_build", "read_pack"]

logger = logging.getLogger("expertier")

SUFFIX: Final = ".expertier"
_MAGIC: Final = b"EXPTPACK"
_VERSION: Final = 1
_PREAMBLE: Final = struct.Struct("<8sIIQQQ32s")
_DIGEST_OFFSET: Final = 40
_ALIGNMENT: Final = max(4096, mmap.PAGESIZE)  # what O_DIRECT wants everywhere
_MAX_HEADER: Final = 512 << 20
_FLUSH_STEP: Final = 32 << 20
_ROW_WORDS: Final = 512  # a row of the checksum is 4 KiB: what storage loses is whole sectors
_ROW: Final = 8 * _ROW_WORDS
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OTHER_PLACE: Final = "Give another place with sidecar_dir (EXPERTIER_SIDECAR_DIR), or do without: repack='off'."
_REBUILD: Final = "Delete it: the next start writes it again."

Check = Callable[[memoryview], None]
"""Looks at the bytes of an expert that has just been read and raises when they are wrong."""


@dataclass(frozen=True, kw_only=True)
class PackKey:
    """What the contents of a pack depend on.

    Attributes
    ----------
    model : str
        Fingerprint of the model (:attr:`expertier.catalog.types.Catalog.fingerprint`).
    content : str
        Digest over samples of its weights (:func:`expertier.catalog.gguf.content_digest`).
    layout : str
        Names how the bytes are arranged.
    library : str
        Engine and version that arranged them.
    """

    model: str
    content: str
    layout: str
    library: str

    @property
    def short(self) -> str:
        """Eight letters for a file name."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


class Pack:
    """An opened sidecar file; made by :func:`read_pack`.

    Attributes
    ----------
    path : Path
        The file.
    key : PackKey
        What it was made for.
    parts : dict of str to ExpertPart
        Tensor name to the part, which points into the file.
    """

    def __init__(
        self, path: Path, key: PackKey, parts: Sequence[ExpertPart], checksums: npt.NDArray[np.uint32]
    ) -> None:
        self.path = path
        self.key = key
        self.parts = {part.name: part for part in parts}
        self._checksums: dict[str, npt.NDArray[np.uint32]] = {}
        first = 0
        for part in parts:
            self._checksums[part.name] = checksums[first : first + part.experts]
            first += part.experts
        self._verified: set[tuple[str, int]] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all experts in the file, padding included."""
        return sum(part.experts * part.stride for part in self.parts.values())

    def layers(self, layers: Iterable[LayerExperts]) -> tuple[LayerExperts, ...]:
        """Return `layers` with every part that the pack holds taken from the pack; the others stay where they are.

        Raises
        ------
        SidecarError
            A part of the pack is not of the shape or type it has in the model, or has no counterpart there.
        """
        unused = dict(self.parts)
        result = tuple(
            replace(layer, parts=tuple(self._counterpart(part, unused.pop(part.name, None)) for part in layer.parts))
            for layer in layers
        )
        if unused:
            raise SidecarError(f"{self.path} holds {min(unused)}, which the model does not have.", _REBUILD)
        return result

    def _counterpart(self, part: ExpertPart, packed: ExpertPart | None) -> ExpertPart:
        if packed is None:
            return part
        if replace(part, file=packed.file, offset=packed.offset, padded_bytes=packed.padded_bytes) != packed:
            raise SidecarError(f"{self.path} holds {part.name} in another shape or type than the model.", _REBUILD)
        return packed

    def check(self, name: str, expert: int) -> Check | None:
        """Return what has to look at an expert once it has been read, or ``None`` when that was done before.

        Parameters
        ----------
        name : str
            Tensor name; a part that is not in the pack needs no check.
        expert : int
            Index of the expert.
        """
        if not self._unseen(name, expert):
            return None
        return lambda data: self._verify(name, expert, checksum(data))

    def check_in_pieces(self, name: str, expert: int) -> PieceCheck | None:
        """Like :meth:`check`, for an expert that is never in one place."""
        if not self._unseen(name, expert):
            return None
        return PieceCheck(self.parts[name].expert_bytes, lambda value: self._verify(name, expert, value))

    def _unseen(self, name: str, expert: int) -> bool:
        return name in self._checksums and (name, expert) not in self._verified

    def _verify(self, name: str, expert: int, value: int) -> None:
        if value != int(self._checksums[name][expert]):
            raise SidecarError(f"{self.path} is damaged: expert {expert} of {name} has a wrong checksum.", _REBUILD)
        self._verified.add((name, expert))


def checksum(data: memoryview | bytes) -> int:
    """Checksum of an expert, ten times as fast as a plain CRC and without holding the interpreter lock.

    The data are taken as a table of 64-bit words with 512 columns. The CRC-32 is computed over the sums of all rows and
    the sums of all columns (modulo 2^64), followed by the bytes that do not fill a row. A change goes unseen only if
    it cancels out within every row and within every column at once.

    Parameters
    ----------
    data : memoryview or bytes
        Contiguous bytes.

    Returns
    -------
    int
        32 bits, unsigned.
    """
    view = memoryview(data).cast("B")
    sums = _Sums(len(view))
    sums.add(0, view)
    return sums.value()


class _Sums:
    """What a checksum is computed from; pieces come in any order, each begins on a row."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._whole = nbytes // _ROW * _ROW
        self._columns = np.zeros(_ROW_WORDS, "<u8")
        self._rows = np.zeros(self._whole // _ROW, "<u8")
        self._rest = b""

    def add(self, offset: int, piece: memoryview) -> None:
        inside = max(0, min(len(piece), self._whole - offset))
        if offset + len(piece) > self._whole:
            self._rest = bytes(piece[inside:])
        if inside:
            table = np.frombuffer(piece[:inside], "<u8").reshape(-1, _ROW_WORDS)
            self._columns += table.sum(axis=0, dtype="<u8")
            self._rows[offset // _ROW : (offset + inside) // _ROW] = table.sum(axis=1, dtype="<u8")

    def value(self) -> int:
        value = zlib.crc32(self._rest, self._nbytes & 0xFFFFFFFF)
        if self._whole:
            for sums in (self._columns, self._rows):
                value = zlib.crc32(sums.tobytes(), value)
        return value


class PieceCheck:
    """Looks at an expert's bytes piece by piece, in any order, from any thread; see :meth:`Pack.check_in_pieces`."""

    def __init__(self, nbytes: int, verify: Callable[[int], None]) -> None:
        self._sums = _Sums(nbytes)
        self._verify = verify
        self._lock = threading.Lock()

    def add(self, offset: int, piece: memoryview) -> None:
        """Take in bytes that begin at `offset`, a multiple of 4096 (or whatever is left at the end)."""
        with self._lock:
            self._sums.add(offset, piece)

    def finish(self) -> None:
        """Raise SidecarError when the bytes, now complete, are wrong."""
        self._verify(self._sums.value())


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_pack(path: Path, key: PackKey) -> Pack:
    """Open a sidecar file.

    Parameters
    ----------
    path : Path
        The file.
    key : PackKey
        What it must have been made for.

    Raises
    ------
    SidecarError
        It cannot be read, is damaged, or belongs to another model, kind of CPU or engine version.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_PREAMBLE.size)
            if len(head) < _PREAMBLE.size or head[:8] != _MAGIC:
                raise SidecarError(f"{path} is not a sidecar file, or its writing was cut short.", _REBUILD)
            _, version, count, json_bytes, start, stated_size, digest = _PREAMBLE.unpack(head)
            if version != _VERSION:
                raise SidecarError(f"{path} has format version {version}, this Expertier knows {_VERSION}.", _REBUILD)
            if size != stated_size:
                raise SidecarError(f"{path} is damaged: it has {size} bytes instead of {stated_size}.", _REBUILD)
            if not _PREAMBLE.size + json_bytes + 4 * count <= start <= min(size, _MAX_HEADER):
                raise SidecarError(f"{path} is damaged: its header contradicts itself.", _REBUILD)
            header = head + file.read(start - len(head))
    except OSError as error:
        raise SidecarError(f"{path} cannot be read: {error.strerror}.", _OTHER_PLACE) from error
    if _header_digest(header) != digest:
        raise SidecarError(f"{path} is damaged: its header has a wrong checksum.", _REBUILD)
    table = _PREAMBLE.size + json_bytes
    try:
        fields = json.loads(header[_PREAMBLE.size : table])
        found = PackKey(**fields["key"])
        parts = tuple(_part_from(path, part) for part in fields["parts"])
        consistent = sum(part.experts for part in parts) == count and all(
            start <= part.offset and part.offset + part.experts * part.stride <= size and part.stride % 4096 == 0
            for part in parts
        )
    except (ValueError, KeyError, TypeError) as error:
        raise SidecarError(f"{path} is damaged: its header cannot be understood ({error}).", _REBUILD) from error
    if not consistent:
        raise SidecarError(f"{path} is damaged: its header contradicts itself.", _REBUILD)
    _compare(path, found, key)
    return Pack(path, found, parts, np.frombuffer(header, "<u4", count, table).copy())


def _compare(path: Path, found: PackKey, wanted: PackKey) -> None:
    if (found.model, found.content) != (wanted.model, wanted.content):
        raise SidecarError(f"{path} belongs to another model.", _REBUILD)
    if found.library != wanted.library:
        raise SidecarError(f"{path} was written with {found.library}, this is {wanted.library}.", _REBUILD)
    if found.layout != wanted.layout:
        raise SidecarError(f"{path} was written for another kind of CPU.", _REBUILD)


def _part_from(path: Path, fields: dict[str, Any]) -> ExpertPart:
    shape = tuple(int(size) for size in fields["shape"])
    return ExpertPart(
        name=str(fields["name"]),
        layer=int(fields["layer"]),
        role=fields["role"],
        file=path,
        offset=int(fields["offset"]),
        expert_bytes=int(fields["expert_bytes"]),
        experts=shape[-1],
        type_name=str(fields["type"]),
        shape=shape,
        padded_bytes=int(fields["padded_bytes"]),
    )


def _header_digest(header: bytes) -> bytes:
    digest = hashlib.blake2b(header[:_DIGEST_OFFSET], digest_size=32)
    digest.update(bytes(32))
    digest.update(header[_DIGEST_OFFSET + 32 :])
    return digest.digest()


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where everything goes in a file about to be written."""

    parts: tuple[ExpertPart, ...]
    text: bytes
    start: int
    size: int

    @classmethod
    def of(cls, path: Path, key: PackKey, parts: Sequence[ExpertPart]) -> _Plan:
        count = sum(part.experts for part in parts)
        start = 0
        while True:  # the text names offsets, and their digits are part of its length
            offset, placed = start, []
            for part in parts:
                padded = _up(part.expert_bytes)
                placed.append(replace(part, file=path, offset=offset, padded_bytes=padded))
                offset += padded * part.experts
            fields = {"key": asdict(key), "parts": [_fields_of(part) for part in placed]}
            text = json.dumps(fields, separators=(",", ":")).encode()
            needed = _up(_PREAMBLE.size + len(text) + 4 * count)
            if needed <= start:
                return cls(parts=tuple(placed), text=text, start=start, size=offset)
            start = needed

    def header(self, checksums: npt.NDArray[np.uint32]) -> bytes:
        body = self.text + checksums.astype("<u4").tobytes()
        fields = (_MAGIC, _VERSION, len(checksums), len(self.text), self.start, self.size)
        header = (_PREAMBLE.pack(*fields, bytes(32)) + body).ljust(self.start, b"\0")
        return _PREAMBLE.pack(*fields, _header_digest(header)) + header[_PREAMBLE.size :]


def _fields_of(part: ExpertPart) -> dict[str, Any]:
    return {
        "name": part.name,
        "layer": part.layer,
        "role": part.role,
        "type": part.type_name,
        "shape": part.shape,
        "offset": part.offset,
        "expert_bytes": part.expert_bytes,
        "padded_bytes": part.padded_bytes,
    }


def _up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


Produce = Callable[[], Generator[memoryview, None, None]]
"""Yields every expert's bytes, part by part in the given order; a view is done with when the next one is asked for."""
Announce = Callable[[Path, int], "contextlib.AbstractContextManager[Callable[[int], None]]"]
"""Called with path and size when writing begins; the context's value is told the bytes of every expert written."""


def find_or_build(
    directories: Sequence[Path],
    name: str,
    *,
    key: PackKey,
    parts: Sequence[ExpertPart],
    produce: Produce,
    announce: Announce,
) -> Pack:
    """Return the pack from the first directory that has it, or else build it in the first one that can be written to.

    Parameters
    ----------
    directories : sequence of Path
        Where to look and build, in this order.
    name : str
        File name.
    key, parts, produce, announce
        As for :func:`build_pack`.

    Raises
    ------
    SidecarError
        None is there and none can be built; also when the disk is full, whatever directories would follow.
    """
    for directory in directories:
        path = directory / name
        if os.path.exists(path):  # a Path's own method raises where a folder may not be looked into
            try:
                return read_pack(path, key)
            except SidecarError as error:
                logger.warning("%s It is not used.", error.problem)
    refused: OSError | None = None
    for directory in directories:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return build_pack(directory / name, key=key, parts=parts, produce=produce, announce=announce)
        except OSError as error:
            refused = error
            logger.info("no sidecar in %s: %s", directory, error.strerror)
    reason = refused.strerror if refused else "there is no directory to write to"
    places = ", ".join(str(directory) for directory in directories)
    raise SidecarError(f"The sidecar {name} cannot be written to {places}: {reason}.", _OTHER_PLACE) from refused


def build_pack(
    target: Path, *, key: PackKey, parts: Sequence[ExpertPart], produce: Produce, announce: Announce
) -> Pack:
    """Write a sidecar file, unless another process has just done so.

    Several processes that want the same file take turns: the first writes it, the others wait and use it. Nothing is
    left behind when it fails or is interrupted; what a killed writer left is removed by the next.

    Parameters
    ----------
    target : Path
        File to write; one that is there and not valid for `key` is replaced.
    key : PackKey
        What the contents depend on.
    parts : sequence of ExpertPart
        The parts to write, as they are in the model; place and padding are chosen here.
    produce : callable
        Returns an iterator over the experts' bytes, in the order of `parts`.
    announce : callable
        Called when writing begins.

    Returns
    -------
    Pack
        The file, opened.

    Raises
    ------
    SidecarError
        The disk is full.
    OSError
        The directory cannot be written to or locked.
    """
    plan = _Plan.of(target, key, parts)
    try:
        with _locked(target):
            if target.exists():
                with contextlib.suppress(SidecarError):
                    return read_pack(target, key)
                target.unlink()
            _write_and_rename(target, plan, produce, announce)
            return read_pack(target, key)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _full(target, plan.size, _free(target)) from error
        raise


def _write_and_rename(target: Path, plan: _Plan, produce: Produce, announce: Announce) -> None:
    temporary = target.with_name(target.name + ".part")
    temporary.unlink(missing_ok=True)
    _remove_leftovers(target)
    if (free := _free(target)) < plan.size:
        raise _full(target, plan.size, free)
    try:
        with announce(target, plan.size) as progress:
            _write(temporary, plan, produce, progress)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _write(path: Path, plan: _Plan, produce: Produce, progress: Callable[[int], None]) -> None:
    checksums: list[int] = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.lseek(descriptor, plan.start, os.SEEK_SET)
        experts, done, flushed = produce(), 0, 0
        with contextlib.closing(experts):
            for part in plan.parts:
                padding = bytes(part.stride - part.expert_bytes)
                for _ in range(part.experts):
                    data = next(experts, None)
                    if data is None or len(data) != part.expert_bytes:
                        raise ValueError(f"{part.name} needs {part.expert_bytes} bytes per expert, other data came")
                    checksums.append(checksum(data))
                    _write_all(descriptor, data)
                    _write_all(descriptor, padding)
                    done += part.stride
                    if done - flushed >= _FLUSH_STEP:
                        # Starts writing back what is new and drops what has been written back since the last time:
                        # the page cache never holds much of the file.
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                        flushed = done
                    progress(part.stride)
        header = plan.header(np.array(checksums, np.uint32))
        os.lseek(descriptor, 0, os.SEEK_SET)
        _write_all(descriptor, header)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def _free(target: Path) -> int:
    status = os.statvfs(target.parent)
    return status.f_bavail * status.f_frsize


def _full(target: Path, size: int, free: int) -> SidecarError:
    return SidecarError(
        f"The sidecar {target} needs {format_bytes(size)} ({size} bytes) and {format_bytes(free)} ({free} bytes) are "
        "free there.",
        f"Make room. {_OTHER_PLACE}",
    )


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some filesystems cannot; the file itself is safe
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- taking turns ----------------------------------------------------------------------------------------------------


def _lock_path(target: Path) -> Path:
    return target.with_name(target.name + ".lock")


def _try_lock(path: Path, *, wait: bool) -> int | None:
    """Lock a file that is removed while it is locked; return its descriptor, ``None`` when another one has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    os.close(descriptor)
                    return None
                logger.info("waiting for another process that writes %s", path.with_suffix(""))
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner has removed it meanwhile


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    path = _lock_path(target)
    descriptor = _try_lock(path, wait=True)
    assert descriptor is not None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of other sidecars of the same model have left."""
    stem = target.name[: -len(SUFFIX)].rpartition(".")[0]
    for leftover in target.parent.iterdir():
        name = leftover.name
        if not (name.startswith(stem + ".") and name.endswith(SUFFIX + ".part")):
            continue
        if name[len(stem) + 1 : -len(SUFFIX + ".part")].count("."):
            continue  # the sidecar of another model, whose name only begins alike
        lock = leftover.with_suffix(".lock")
        with contextlib.suppress(OSError):
            descriptor = _try_lock(lock, wait=False)
            if descriptor is None:
                continue  # somebody is writing it
            try:
                leftover.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
