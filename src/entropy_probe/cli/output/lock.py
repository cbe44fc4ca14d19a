"""One process at a time in a directory that is being built up."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entropy_probe.report.text import printable

LOCK_FILE = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes out of a directory; it is made if missing, and removed again if it is left empty.

    The lock is the kernel's, on a file in the directory: it ends with the process, however that ends, and the file that
    a killed process leaves blocks nobody. Where the file system has no locks, a note on stderr says so.

    Raises:
        ValueError: if another process holds the directory, or it is a file or cannot be written into.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir: expected a directory, {directory} is a file; choose another one")
    existed = directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = _take(directory / LOCK_FILE)
    except BlockingIOError as error:
        raise ValueError(
            f"output_dir: another process is working in {directory}; wait for it to end, or choose another one"
        ) from error
    except OSError as error:
        raise cannot_write(directory, error) from error
    try:
        yield
    finally:
        (directory / LOCK_FILE).unlink(missing_ok=True)
        os.close(held)
        if not existed and not any(directory.iterdir()):
            directory.rmdir()


def cannot_write(directory: Path, error: OSError) -> ValueError:
    """The words for a directory that cannot be written into."""
    return ValueError(f"output_dir: cannot write into {directory}: {error.strerror}; choose another one")


def _take(file: Path) -> int:
    """A descriptor of the file, which is made if missing, that holds the lock on it."""
    import fcntl

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, descriptor):
                return descriptor
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                note = f"note: {file.parent} cannot be locked ({error.strerror}): keep other processes out of it"
                sys.stderr.write(printable(note) + "\n")
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that its last holder removed in between: try again


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
