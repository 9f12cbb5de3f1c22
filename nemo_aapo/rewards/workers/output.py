"""What a worker writes to its standard error: passed on to ours at once, and its end remembered for messages."""

from __future__ import annotations

import contextlib
import os
import select
import threading

from nemo_aapo.errors import one_line

_REMEMBERED = 400
"""Bytes that a message quotes."""
_READ_BYTES = 1 << 16
_LOOK_S = 0.2
"""How often the thread looks whether it should end: the end of the pipe may never come, as a child that the worker
left behind can hold it."""
_END_S = 2.0


class LastWords:
    """The reading end of a pipe, and a thread that empties it."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        self._tail = b""
        self._ending = False
        self._thread = threading.Thread(target=self._pass_on, name="reward-worker-output", daemon=True)
        self._thread.start()

    def close_writer(self) -> None:
        """Leave the writing end to the worker, which has its own by now."""
        os.close(self.writer)

    def end(self) -> str:
        """Stop when all that is there was passed on; the last of it, in one line. May be called again."""
        self._ending = True
        self._thread.join(_END_S)
        return one_line(self._tail[-_REMEMBERED:].decode(errors="replace"))

    def _pass_on(self) -> None:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        try:
            while (ready := poll.poll(1000 * _LOOK_S)) or not self._ending:
                if ready:
                    if not (data := os.read(self._reader, _READ_BYTES)):
                        return
                    self._tail = (self._tail + data)[-_REMEMBERED:]
                    with contextlib.suppress(OSError):  # our own standard error may be gone
                        os.write(2, data)
        finally:
            os.close(self._reader)
