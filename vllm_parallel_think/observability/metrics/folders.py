"""Folders in which front ends keep their metrics: made, locked, and removed if left behind.

A front end holds a lock in its folder for as long as it lives. A number of a process says less: it
is given again, in a container to the very same server, and means nothing in another container that
shares the temporary directory.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "vllm-parallel-think-"
LOCK = "lock"
_NUM_TRIES = 5

_locks: list[int] = []
"""Open as long as this process lives. Forked engines inherit them: a folder is theirs, too."""


def make(parent: Path) -> Path:
    """Make and lock a folder.

    Raises:
        OSError: It cannot be made.

    """
    for _ in range(_NUM_TRIES):
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
        if _lock(folder):
            return folder
    raise OSError(f"folders made in {parent} were removed at once")


def remove_left_behind(parent: Path) -> None:
    """Remove folders of front ends that were killed; one that cannot be removed is left."""
    for folder in list(parent.glob(f"{PREFIX}*")):
        with suppress(OSError):
            _remove_if_left_behind(folder)


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine runs, whoever owns it."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _lock(folder: Path) -> bool:
    """Lock a new folder; return whether no other server took it for one that was left behind."""
    path = folder / LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileNotFoundError:
        return False
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kept = os.path.samestat(os.fstat(lock), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        kept = False
    except OSError:  # a file system without locks: nobody gets this one and removes the folder
        kept = True
    if kept:
        _locks.append(lock)
    else:
        os.close(lock)
    return kept


def _remove_if_left_behind(folder: Path) -> None:
    named = re.fullmatch(rf"{PREFIX}([0-9]+)-.*", folder.name)
    state = folder.lstat()
    if named is None or not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        return
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        # Of a version without locks, or just being made; this process has locked what it made.
        owner = int(named[1])
        if owner == os.getpid() or not is_alive(owner):
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its server lives: BlockingIOError
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
