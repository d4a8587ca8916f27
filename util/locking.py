"""One run at a time in an output_dir."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from util import distributed
from util.errors import UserError, warn


@contextlib.contextmanager
def lock(output_dir: str | Path, process: distributed.Process) -> Iterator[None]:
    """Keep other runs out of output_dir within this context.

    The lock is the main process's and dies with it: a worker that outlives it doesn't hold it.

    Raises:
        UserError: in all processes, if another run holds it.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if process.is_main:
            try:
                file = stack.enter_context(open(Path(output_dir) / ".lock", "a+b", buffering=0))
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(OSError):  # on a full disk it says nothing, and holds
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except BlockingIOError:
                file.seek(0)
                holder = " ".join(file.read().decode(errors="replace").split()) or "unknown"
                problem = (
                    f"another run ({holder}) is using {output_dir}: stop it, "
                    "or choose another --output_dir"
                )
            except OSError as error:
                warn(
                    f"{output_dir} can't be locked ({error.strerror}): make sure that no other "
                    "run uses it"
                )
        problem = distributed.gather(problem)[0]
        if problem:
            raise UserError(problem)
        yield
