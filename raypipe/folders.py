"""The folder of a run: made, held by one process, watched for a storage that fails."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from raypipe.config import TuneConfig
from raypipe.console import resume_command
from raypipe.errors import RunFailed, UserError
from raypipe.failures import behind, is_disk_full, storage_words
from raypipe.files import is_torn, remove_torn
from raypipe.lease import LOCK, only_writer
from raypipe.reading import write_yaml
from raypipe.storage import Place, StorageError


def new_run_folder(results: Place, name: str | None, *, kind: str = "tune") -> Place:
    """RESULTS/NAME, which must be new; without a name the next free one of tune, tune-2, ... (the `kind`)."""
    if name is not None and ("/" in name or name in ("", ".", "..")):
        raise UserError(f"--name {name}: is the name of one folder in --results {results}, without any /")
    with naming(f"--results {results}"):
        try:
            if name is None:
                names = (f"{kind}-{number}" if number > 1 else kind for number in itertools.count(1))
                name = next(free for free in names if not (results / free).exists())
            folder = results / name
            there = not is_blank(folder)
            if not there:
                folder.mkdir(parents=True, exist_ok=True)
        except StorageError:
            raise
        except OSError as error:
            raise UserError(
                f"--results {results}: {folder} cannot be made: {error.strerror or error}"
            ) from None
    if there:
        raise UserError(
            f"--name {name}: {folder} exists; choose another name, or go on with it: {resume_command(folder)}"
        )
    return folder


def is_blank(folder: Place) -> bool:
    """Whether no run has begun there: it is not there, or one was killed before it had."""
    names = (entry.name for entry in folder.glob("*"))
    return not folder.is_file() and all(name == LOCK or is_torn(name, ["config.yaml"]) for name in names)


@contextmanager
def none_left_blank(folder: Place) -> Iterator[None]:
    """Removes the folder afterwards where no run has begun there: after what kept it from that is mended, the
    same command works. For the one who holds the folder."""
    try:
        yield
    finally:
        if isinstance(folder, Path) and is_blank(folder):
            with suppress(OSError):
                remove_torn(folder, ["config.yaml"])
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()


def begin(config: TuneConfig, folder: Place) -> None:
    """Makes a folder that this run alone holds its own."""
    if (folder / "config.yaml").exists():  # in a bucket nothing tells of a folder before something is in it
        raise UserError(f"{folder}: another run began there at the same time; run the command again")
    write_yaml(config, folder / "config.yaml")


def alone_in(folder: Place) -> AbstractContextManager[Callable[[], None]]:
    """Refuses a second process that works on the same run. Raises UserError."""
    refuse = "another process works on this run; wait for it, or end it"
    return only_writer(folder, named=str(folder), refuse=refuse)


@contextmanager
def storage_watched(folder: Place, *, go_on: str) -> Iterator[None]:
    """Turns a full disk or a storage that does not answer, wherever it was met, into one sentence with what
    to type then."""
    try:
        yield
    except Exception as error:
        for own in behind(error):  # Ray Tune wraps what a callback raises
            if isinstance(own, UserError):  # it says where, and what to do
                raise own from None
        if is_disk_full(error):
            where = folder if isinstance(folder, Path) else tempfile.gettempdir()
            said = f"{where}: No space left on device; make room there"
        elif words := storage_words(error):
            said = f"{folder}: the storage fails: {words}; mend that"
        else:
            raise
        raise RunFailed(f"{said}, then go on: {go_on}") from None


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns a storage that does not answer before the run has begun into one sentence."""
    try:
        yield
    except StorageError as error:
        raise UserError(f"{what}: cannot be read: {error}") from None
