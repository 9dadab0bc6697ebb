"""Loads a model into an unpatched llama.cpp with its experts left on storage."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from ctypes import c_void_p
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as C  # noqa: N812 - the name llama-cpp-python itself uses for its C interface

from expertier.errors import ModelFormatError
from expertier.storage import IoMode, StorageFile
from expertier_llamacpp.buffer import ExpertBuffers
from expertier_llamacpp.signals import HeldSignals

_patching = threading.Lock()


class ModelLoader:
    """Stands in for ``llama_model_load_from_file`` while one model is constructed.

    Parameters
    ----------
    path : Path
        The model, for messages.
    files : collection of StorageFile
        Its open files.
    buffers : ExpertBuffers
        Where the expert tensors go.
    extra_buffer_types : bool
        llama.cpp's ``use_extra_bufts``: whether other weights may be repacked for the CPU, as stock does by default.
    on_loaded : callable
        Called with the bound tensors when the model is loaded and before its context is made; returns the eval
        callback of the context.
    sequences : int
        Sequences the context can hold, in one KV buffer.
    """

    def __init__(
        self,
        *,
        path: Path,
        files: Collection[StorageFile],
        buffers: ExpertBuffers,
        extra_buffer_types: bool,
        on_loaded: Callable[[dict[int, tuple[str, int]]], Any],
        sequences: int = 1,
    ) -> None:
        self._path = path
        self._files = files
        self._buffers = buffers
        self._extra_buffer_types = extra_buffer_types
        self._on_loaded = on_loaded
        self._sequences = sequences
        self._callback: Any = None
        self._signals = signals = HeldSignals()
        # The model's parameters keep the callback, so it must not refer to this loader, which refers to the model.
        self._progress = C.llama_progress_callback(lambda _done, _data: not signals.interrupted)
        self.error: BaseException | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Redirect this thread's model and context creation while the block runs.

        ``llama_cpp.Llama`` offers no argument for buffer overrides, extra buffer types, several sequences or the eval
        callback, so the two module functions it calls are replaced for the duration; other threads get the originals.
        """
        thread = threading.get_ident()

        def load(path: bytes, params: Any) -> Any:
            return self._load(path, params, stock_load) if threading.get_ident() == thread else stock_load(path, params)

        def init(model: Any, params: Any) -> Any:
            if threading.get_ident() == thread and self._callback is not None:
                params.cb_eval = self._callback
                if self._sequences > 1:
                    params.n_seq_max = self._sequences
                    params.kv_unified = True  # sequences share the cells of a common prefix
            return stock_init(model, params)

        with _patching:
            stock_load, stock_init = C.llama_model_load_from_file, C.llama_init_from_model
            C.llama_model_load_from_file, C.llama_init_from_model = load, init
            try:
                with self._signals:
                    yield
            finally:
                C.llama_model_load_from_file, C.llama_init_from_model = stock_load, stock_init

    def _load(self, path: bytes, params: Any, stock_load: Callable[[bytes, Any], Any]) -> Any:
        try:
            return self._load_or_raise(path, params, stock_load)
        except BaseException as error:
            # llama_cpp turns any failure into "Failed to load model from file"; keep the real one.
            self.error = error
            raise

    def _load_or_raise(self, path: bytes, params: Any, stock_load: Callable[[bytes, Any], Any]) -> Any:
        # Without a mapping of the file: mapping one makes llama.cpp populate it, experts included.
        lock_memory = params.load_mode in (C.LLAMA_LOAD_MODE_MLOCK, C.LLAMA_LOAD_MODE_MMAP_MLOCK)
        params.load_mode = C.LLAMA_LOAD_MODE_MLOCK if lock_memory else C.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = self._extra_buffer_types
        params.tensor_buft_overrides = ctypes.cast(self._buffers.overrides, c_void_p)
        params.progress_callback = self._progress  # gives up between two tensors when the user has
        model = stock_load(path, params)
        for file in self._files:
            file.drop_cache()
        if self._buffers.error is not None:
            raise self._buffers.error
        if not model:
            raise ModelFormatError(
                f"llama.cpp refuses to load {self._path}.", "Load it with verbose=True to see llama.cpp's own message."
            )
        try:
            self._callback = self._on_loaded(self._buffers.bind())
        except BaseException:
            C.llama_model_free(model)
            raise
        return model


def open_files(paths: Sequence[Path], mode: IoMode) -> dict[Path, StorageFile]:
    """Open every file for expert reads; none stays open when one fails."""
    files: dict[Path, StorageFile] = {}
    try:
        for path in paths:
            files[path] = StorageFile(path, mode)
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return files
