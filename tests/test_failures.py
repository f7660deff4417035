"""Why a trial failed, from errors that really happened."""

import errno
import os

import numpy as np
import pytest

from raypipe.errors import Diverged
from raypipe.failures import failure_of, failure_of_process, is_disk_full, sentence_of
from raypipe.storage import StorageError


def raised(act) -> BaseException:
    with pytest.raises(Exception) as caught:
        act()
    return caught.value


def fill_the_disk() -> None:
    with open("/dev/full", "w") as full:
        full.write("x")


def wrap_a_full_disk() -> None:
    try:
        fill_the_disk()
    except OSError as error:
        raise RuntimeError("could not save") from error


def wrap_a_storage_that_is_away() -> None:
    try:
        raise StorageError("When putting: no answer")
    except StorageError as error:
        raise RuntimeError("could not save") from error


def diverge() -> None:
    raise Diverged("fold 3 diverged in epoch 7: a lower learning_rate may help")


class ResourceExhaustedError(Exception):
    """TensorFlow's is known by its name."""


@pytest.mark.parametrize(
    ("act", "reason", "words"),
    [
        (lambda: np.zeros(1 << 50), "out_of_memory", "Unable to allocate"),
        (lambda: [][0], "error", "IndexError: list index out of range"),
        (fill_the_disk, "disk_full", "No space left on device"),
        (wrap_a_full_disk, "disk_full", "could not save"),
        (wrap_a_storage_that_is_away, "storage", "When putting: no answer"),
        (diverge, "diverged", "fold 3 diverged in epoch 7: a lower"),
    ],
)
def test_an_error_has_a_reason(act, reason, words):
    found, message = failure_of(raised(act))
    assert found == reason and words in message


def test_tensorflows_own_memory_error():
    error = ResourceExhaustedError("OOM when allocating tensor with shape[32,4096]")
    assert failure_of(error)[0] == "out_of_memory"


@pytest.mark.parametrize(
    "words",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.",
        "INTERNAL: failed to create a stream: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "Failed to load in-memory CUBIN: out of memory",
    ],
)
def test_memory_errors_that_have_no_class_of_their_own(words):
    assert failure_of(RuntimeError(words))[0] == "out_of_memory"
    wrapped = ValueError("the step failed")
    wrapped.__cause__ = RuntimeError(words)
    assert failure_of(wrapped)[0] == "out_of_memory"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "The actor died unexpectedly before finishing this task.\n... killed by the OOM killer ...",
            "killed",
        ),
        ("The actor is dead because its node has died.", "killed"),
        (
            "ray.exceptions.OutOfMemoryError: Task was killed",
            "out_of_memory",
        ),
        ("OSError: [Errno 28] No space left on device", "disk_full"),
        ("Traceback ...\nraypipe.storage.StorageError: no answer", "storage"),
        ("Traceback ...\nValueError: no", "error"),
    ],
)
def test_a_process_that_ended_without_a_word(text, reason):
    assert failure_of_process(text)[0] == reason


def test_hdf5_says_it_without_a_number():
    error = OSError("Can't write data (file write failed: error message = 'No space left on device')")
    assert is_disk_full(error) and is_disk_full(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
    assert not is_disk_full(OSError(errno.ENOENT, "no such file"))


def test_an_error_is_one_sentence():
    assert sentence_of("Failure # 1\nTraceback ...\nValueError: no memory\n") == "ValueError: no memory"
    assert sentence_of("Traceback ...\nraypipe.errors.Diverged: fold 1 diverged") == "fold 1 diverged"
    assert sentence_of("") == "unknown error"
