"""What C libraries such as libjpeg print on stderr, as text, so that it can be said of which file.

Their `stderr` is a variable, which may be set (the GNU C library's manual, "Standard Streams").
The process's stderr stays as it is: other threads, and Python itself, print as ever.
"""

import contextlib
import ctypes
import functools
import os


class _Memory:
    """A C stream to memory, and the variable in which C keeps stderr."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None)
        name = "stderr" if hasattr(self.libc, "stderr") else "__stderrp"  # as macOS calls it
        self.variable = ctypes.c_void_p.in_dll(self.libc, name)
        self.usual, self.users = self.variable.value, 0
        self.text, self.size = ctypes.c_void_p(), ctypes.c_size_t()
        self.libc.open_memstream.restype = ctypes.c_void_p
        address = self.libc.open_memstream(ctypes.byref(self.text), ctypes.byref(self.size))
        self.stream = ctypes.c_void_p(address)

    def take(self) -> str:
        """What was printed since this was last called."""
        self.libc.fflush(self.stream)
        if not self.size.value:
            return ""
        text = ctypes.string_at(self.text.value or 0, self.size.value)
        self.libc.rewind(self.stream)
        return text.decode(errors="backslashreplace")


@functools.cache
def _memory(process: int) -> _Memory | None:
    """One for each process, as a fork may copy a stream that is in use; None where C has none."""
    with contextlib.suppress(AttributeError, ValueError):
        return _Memory()
    return None


class Caught:
    """A context that keeps C libraries' messages off stderr; afterwards they are its `text`."""

    text = ""

    def __enter__(self) -> "Caught":
        self._memory = _memory(os.getpid())
        if self._memory:
            self._memory.users += 1
            self._memory.variable.value = self._memory.stream.value
        return self

    def __exit__(self, *_: object) -> None:
        if self._memory:
            self._memory.users -= 1
            if not self._memory.users:  # neither a context around this one nor another thread's
                self._memory.variable.value = self._memory.usual
            self.text = self._memory.take()
