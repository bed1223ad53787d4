"""Runs a job on one node for `lightning-accel ssh-run`, and leaves no process of it behind.

The job comes on standard input, as one line of JSON with `argv`, `variables` and `workdir`, so that no part of it shows in a
command line. Further lines are names of signals, which the agent sends to the job's processes. The end of the input, which is
also what a lost connection looks like, ends the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

_FAILED = 1

_GRACE_SECONDS = 10.0
"""Time between SIGTERM and SIGKILL."""


def main() -> int:
    """Runs the job; returns its exit code, 128 + n if signal n ended it, or 1 if it cannot be started."""
    lines = _input_lines()
    job = json.loads(next(lines))
    try:
        process = subprocess.Popen(
            job["argv"],
            cwd=job["workdir"],
            env={**os.environ, **job["variables"]},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a process group of its own, to be signalled as a whole
        )
    except OSError as error:
        print(f"lightning-accel ssh-run: cannot start here: {error}; see --workdir and --python", file=sys.stderr)
        return _FAILED
    threading.Thread(target=_forward_signals, args=(process, lines), daemon=True).start()
    code = process.wait()
    _signal_all(process, signal.SIGKILL)  # processes that the job left behind
    return 128 - code if code < 0 else code


def _input_lines() -> Iterator[str]:
    """Yields lines of standard input without Python's buffer, whose lock a waiting thread would hold at interpreter exit."""
    rest = b""
    while data := os.read(0, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in lines)


def _forward_signals(process: subprocess.Popen[bytes], lines: Iterator[str]) -> None:
    for line in lines:
        _signal_all(process, signal.Signals[line])
    _signal_all(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)
    _signal_all(process, signal.SIGKILL)


def _signal_all(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
