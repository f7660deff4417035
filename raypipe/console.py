"""What a person sees: log lines, one live line of progress, and how a command ends."""

import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from raypipe.errors import UserError

LOG = logging.getLogger("raypipe")
PLAIN_INTERVAL_S = 10.0


def setup_logging() -> None:
    """Log lines to standard error: time, level where it matters, message."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return f"{record.levelname.lower()}: {line}" if record.levelno >= logging.WARNING else line


class LiveLine:
    """One line that is rewritten in place on a terminal; elsewhere a log line every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last_s = time.monotonic()
        self._shown = False

    def show(self, text: str) -> None:
        """Puts the text in the line's place, cut to the terminal's width."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
            sys.stderr.flush()
            self._shown = True
        elif time.monotonic() - self._last_s >= PLAIN_INTERVAL_S:
            self._last_s = time.monotonic()
            LOG.info(text)

    def close(self) -> None:
        """Clears the live line; what follows starts on a clean one."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def duration(seconds: float) -> str:
    """
    >>> duration(20), duration(3725)
    ('0:20', '1:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def shown_path(path: Path) -> str:
    """A path as a person would type it: relative where it lies in the working folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


GO_ON = "what was finished is kept, run the same command to go on"


def run_command(main: Callable[[], object], *, when_stopped: str = GO_ON) -> None:
    """Runs a command and exits: 0 done, 1 failed, 2 wrong use. A person's mistake has no traceback."""
    setup_logging()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_status)
    except KeyboardInterrupt as stop:
        name = str(stop) or "Ctrl-C"
        sys.stderr.write(f"\nstopped by {name}; {when_stopped}\n")
        sys.exit(1)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)
