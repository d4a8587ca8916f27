"""What C libraries such as libjpeg print on stderr, as text, so that it can be said of which file.

Their `stderr` is a variable, which may be set (the GNU C library's manual, "Standard Streams").
The process's stderr stays as it is: other threads, and Python itself, print as ever.
"""

import contextlib
import ctypes
import os
import threading


class _Memory:
    """The variable in which C keeps stderr, and a stream to memory to put there."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None)
        name = "stderr" if hasattr(self.libc, "stderr") else "__stderrp"  # as macOS calls it
        self.variable = ctypes.c_void_p.in_dll(self.libc, name)
        self.usual = self.variable.value
        self.libc.open_memstream.restype = ctypes.c_void_p
        self.begin()
        os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        """Begin anew, also in a forked child: a thread of its parent's may have held any of this.

        What the child prints in a context that its parent began is not caught.
        """
        self.lock = threading.Lock()
        self.users: set[Caught] = set()
        self.variable.value = self.usual
        self.text, self.size = ctypes.c_void_p(), ctypes.c_size_t()
        address = self.libc.open_memstream(ctypes.byref(self.text), ctypes.byref(self.size))
        self.stream = ctypes.c_void_p(address)

    def enter(self, user: "Caught") -> None:
        with self.lock:
            self.users.add(user)
            self.variable.value = self.stream.value

    def leave(self, user: "Caught") -> str:
        """What was printed since the last call."""
        with self.lock:
            self.users.discard(user)
            if not self.users:  # neither a context around this one nor another thread's
                self.variable.value = self.usual
            self.libc.flockfile(self.stream)  # a thread that prints now would move the text
            try:
                return self._take()
            finally:
                self.libc.funlockfile(self.stream)

    def _take(self) -> str:
        self.libc.fflush(self.stream)
        if not self.size.value:
            return ""
        text = ctypes.string_at(self.text.value or 0, self.size.value)
        self.libc.rewind(self.stream)
        return text.decode(errors="backslashreplace")


_memory: _Memory | None = None
with contextlib.suppress(AttributeError, ValueError):  # C has no such stream
    _memory = _Memory()


class Caught:
    """A context that keeps C libraries' messages off stderr; afterwards they are its `text`.

    Threads whose contexts overlap can't be told apart: who leaves first gets what all printed.
    """

    text = ""

    def __enter__(self) -> "Caught":
        if _memory:
            _memory.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        if _memory:
            self.text = _memory.leave(self)
