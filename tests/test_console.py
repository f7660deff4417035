import contextlib
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raypipe.console import LOG, LiveLine, shown_path

# A job in the background is born deaf to Ctrl-C: the child is given its ears back.
PREAMBLE = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from raypipe.console import LOG, LiveLine, run_command
from raypipe.errors import RunFailed, UserError
def main():
"""


def command(body: str) -> list[str]:
    """A command of its own whose main does `body`."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return [sys.executable, "-c", f"{PREAMBLE}{lines}\nrun_command(main)"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("return {'rows': 3}", 0, ""),
        ("raise UserError('--input x: does not exist')", 2, "error: --input x: does not exist\n"),
        ("raise RunFailed('3 of 4 failed; go on')", 1, "error: 3 of 4 failed; go on\n"),
        (
            "raise KeyboardInterrupt",
            1,
            "\nstopped by Ctrl-C; what was finished is kept, run the same command to go on\n",
        ),
    ],
)
def test_how_a_command_ends(body: str, status: int, said: str) -> None:
    done = subprocess.run(command(body), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


def test_a_defect_keeps_its_traceback() -> None:
    done = subprocess.run(command("raise ZeroDivisionError('a defect')"), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "ZeroDivisionError: a defect" in done.stderr


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_lets_the_command_clean_up(number: signal.Signals, name: str) -> None:
    body = """
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("cleaned up", flush=True)"""
    child = subprocess.Popen(command(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=10)
    assert (child.returncode, out) == (1, "cleaned up\n")
    assert err == f"\nstopped by {name}; what was finished is kept, run the same command to go on\n"


def test_log_lines_carry_the_time_and_the_level_where_it_matters() -> None:
    done = subprocess.run(command("LOG.info('a')\nLOG.warning('b')"), capture_output=True, text=True)
    info, warning = done.stderr.splitlines()
    assert info[2:3] == ":" and info[8:] == " a"
    assert warning.startswith("warning: ") and warning.endswith(" b")


# --- the live line ----------------------------------------------------------------------------------


def test_elsewhere_a_log_line_every_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "propagate", True)
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    line = LiveLine()
    with caplog.at_level(logging.INFO, "raypipe"):
        for now_s in (105.0, 110.0, 111.0, 119.0, 125.0):
            line.show(f"{now_s:.0f} s")
    line.close()
    assert caplog.messages == ["110 s", "125 s"]


def shown_on_a_terminal(body: str) -> str:
    """What a command writes to a terminal of 60 columns."""
    terminal, its_end = pty.openpty()
    subprocess.run(command(body), stderr=its_end, env=os.environ | {"COLUMNS": "60"}, check=True)
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # all was read
        while piece := os.read(terminal, 10_000):
            shown += piece
    os.close(terminal)
    return shown.decode()


def test_on_a_terminal_one_line_rewritten_and_cleared() -> None:
    body = "line = LiveLine()\nline.show('a' * 500)\nline.show('b')\nline.close()"
    shown = shown_on_a_terminal(body)
    assert shown == f"\r\x1b[J{'a' * 59}\r\x1b[Jb\r\x1b[J"


def on_screen(written: str, columns: int) -> list[str]:
    """What a terminal shows after this, by the few codes that are used."""
    rows, row, column = [""], 0, 0
    for code in re.findall(r"\x1b\[\d*[AJ]|[\r\n]|.", written):
        if code == "\r":
            column = 0
        elif code == "\n":
            row, column = row + 1, 0  # a terminal in its usual mode returns, too
        elif code.endswith("A") and code != "A":
            row -= int(code[2:-1])
        elif code == "\x1b[J":
            rows[row:] = [rows[row][:column]]
        else:
            if column == columns:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row][:column] + code + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return rows


@pytest.mark.parametrize("columns", [60, 25])
def test_a_table_is_rewritten_in_place_whatever_the_width(columns: int) -> None:
    body = "line = LiveLine()\nLOG.info('before')\nline.show('a' * 50 + '\\nbb\\ncc')\n"
    body += f"import os\nos.environ['COLUMNS'] = '{columns}'\nline.show('d\\ne')\n"
    shown = shown_on_a_terminal(body)
    # The terminal became narrower between the two: it has broken the first line.
    screen = on_screen(shown.replace("\r\n", "\n"), columns)
    assert screen[0].endswith("before") and screen[1:] == ["d", "e"]


def test_a_path_is_shown_as_a_person_would_type_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "results" / "tune") == "results/tune"
    assert shown_path(Path("/elsewhere")) == "/elsewhere"
