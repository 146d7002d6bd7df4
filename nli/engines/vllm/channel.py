"""Messages between two processes of one machine, in batches, over a socket that both hold.

    mine, theirs = socket.socketpair()
    channel = Channel(mine)
    channel.send((17, "question"))          never blocks: a thread writes
    channel.receive()  ->  [(17, "answer"), (18, "answer")]

When either process ends, however it ends, the other's `receive` raises EOFError.
"""

import contextlib
import os
import queue
import socket
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

_MOST_AT_ONCE = 256
_END = object()


class Channel:
    """One end. Any thread may send, one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._connection = Connection(os.dup(end.fileno()))
        self._outgoing: queue.SimpleQueue = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="channel", daemon=True)
        self._writer.start()

    def send(self, message: Any) -> None:
        """Have a message written; one that cannot be is lost, and `receive` tells that the other end is gone."""
        self._outgoing.put(message)

    def receive(self) -> list:
        """The messages of one batch, once there are any. Raises EOFError when the other end sends no more."""
        try:
            return self._connection.recv()
        except OSError:
            raise EOFError from None

    def finish(self, timeout: float | None = None) -> None:
        """Send no more; what was sent before is written first. Receiving goes on."""
        self._outgoing.put(_END)
        self._writer.join(timeout)

    def abandon(self) -> None:
        """Close this process's copy, which a fork made: the other end shall notice when the process that uses the channel is gone."""
        self._socket.close()
        self._connection.close()

    def _write(self) -> None:
        batch: list = []
        try:
            while _END not in batch:
                batch = [self._outgoing.get()]
                while len(batch) < _MOST_AT_ONCE and not self._outgoing.empty():
                    batch.append(self._outgoing.get())
                messages = [message for message in batch if message is not _END]
                if messages:
                    self._connection.send(messages)
        except OSError:  # the other end is gone
            pass
        except Exception:  # a message that cannot be written: the other end would wait for it for ever
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
