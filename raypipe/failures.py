"""Why a trial failed: its code, its numbers, the memory, the disk, the storage, or a killed process."""

import errno
import re
import traceback
from collections.abc import Iterator
from typing import Literal

from raypipe.errors import Diverged
from raypipe.storage import StorageError

Reason = Literal["error", "diverged", "out_of_memory", "killed", "disk_full", "storage"]

NO_FAULT_OF_A_TRIAL = ("disk_full", "storage")
"""The search stops, and such a trial goes on when there is room, or when the storage answers."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DIED = ("The actor died", "The actor is dead", "ActorDiedError", "ActorUnavailableError", "NodeDiedError")
LOW_ON_MEMORY = ("running low on memory", "OutOfMemoryError", "NODE_OUT_OF_MEMORY")
NO_MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "CUDA_ERROR_OUT_OF_MEMORY")
"""JAX's and CUDA's errors have no class of their own for it."""
FULL_WORDS = ("No space left on device", "Disk quota exceeded")


def failure_of(error: BaseException) -> tuple[Reason, str]:
    """The reason, and one sentence, of an error that a trial raised in its process."""
    said = sentence_of("".join(traceback.format_exception_only(error)))
    if isinstance(error, Diverged):
        return "diverged", said
    if is_out_of_memory(error):
        return "out_of_memory", f"{said} (a smaller batch_size, width or depth needs less)"
    if is_disk_full(error):
        return "disk_full", said
    if words := storage_words(error):
        return "storage", words
    return "error", said


def failure_of_process(text: str) -> tuple[Reason, str]:
    """The reason, and one sentence, where a trial's process ended without telling, by Ray's words."""
    if any(words in text for words in LOW_ON_MEMORY):
        return "out_of_memory", "its process was ended by Ray's memory monitor: the node ran low on memory"
    if any(words in text for words in FULL_WORDS):
        return "disk_full", sentence_of(text)
    if (name := f"{StorageError.__name__}: ") in text:
        return "storage", sentence_of(text.rpartition(name)[2].partition("\n")[0])
    if any(name in text for name in DIED):
        return "killed", "its process or node was killed; the kernel does so, too, when memory runs out"
    return "error", sentence_of(text)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the host's or a GPU's memory was too small, directly or as a cause."""
    for one in behind(error):
        # ResourceExhaustedError is TensorFlow's, for GPUs as for the host; it is not imported here.
        if isinstance(one, MemoryError) or type(one).__name__ == "ResourceExhaustedError":
            return True
        if any(words in str(one) for words in NO_MEMORY_WORDS):
            return True
    return False


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error, directly or as its cause."""
    for one in behind(error):
        if isinstance(one, OSError) and one.errno in DISK_FULL:
            return True
        if any(words in str(one) for words in FULL_WORDS):  # HDF5's and Ray's have no number
            return True
    return False


def storage_words(error: BaseException | None) -> str:
    """What a storage said that is behind an error, directly or as its cause; empty where none is."""
    return next((str(one) for one in behind(error) if isinstance(one, StorageError)), "")


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def sentence_of(text: str) -> str:
    """The last line of an error, which says what went wrong."""
    lines = text.strip().splitlines()
    return re.sub(r"^raypipe\.errors\.\w+: ", "", lines[-1].strip()) if lines else "unknown error"
