"""What a process leaves that is killed in the middle of a file."""

import subprocess
import sys
from pathlib import Path

WRITER = """
import resource, signal, sys
from pathlib import Path
from raypipe.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # there the kernel ends it
write_atomically(Path(sys.argv[1]), bytes(100))
"""


def killed_while_writing(*paths: Path) -> None:
    """Leaves at each path what a `write_atomically` does that gets no further than ten bytes."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) for path in paths]
    assert all(writer.wait() < 0 for writer in writers)
