"""A lock on an output folder, so that two processes never train in it at once."""

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from cankd_hf.errors import InputError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
BEAT = 20.0  # seconds between signs of life of the holder
UNREADABLE = 2.0  # seconds that the writing of a lock may take
STALE = 120.0  # seconds without one, after which a lock of another host is taken
_held: dict[Path, int] = {}  # folders that this process holds, and how often


class FolderLock:
    """Context in which this process alone trains in a folder; may be nested in one process.

    The lock file names process and host. A lock whose process has ended, or of another host without a sign of life
    for two minutes, is taken over with a warning.

    Args:
        folder: an existing folder.

    Raises:
        InputError: on entering, if another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder.resolve() / LOCK_FILE
        self._key = self.file.parent / str(os.getpid())
        self._done = threading.Event()

    def __enter__(self) -> "FolderLock":
        if not _held.get(self._key):
            for _ in range(10):  # another process may take a stale lock at the same moment
                if self._create():
                    break
                self._release_stale()
            else:
                raise InputError(f"{self.file}: expected to take this lock, got another process each time; try again")
            threading.Thread(target=self._beat, daemon=True).start()
        _held[self._key] = _held.get(self._key, 0) + 1
        return self

    def __exit__(self, *_: Any) -> None:
        _held[self._key] -= 1
        if not _held[self._key]:
            del _held[self._key]
            self._done.set()
            self.file.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Writes the lock file as a whole, unless there is one."""
        started = psutil.Process().create_time()
        content = {"process": os.getpid(), "host": socket.gethostname(), "started": started}
        own = self.file.with_name(f"{LOCK_FILE}.{socket.gethostname()}.{os.getpid()}")
        own.write_text(json.dumps(content), encoding="utf-8")
        try:
            os.link(own, self.file)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with self.file.open("x", encoding="utf-8") as stream:
                    json.dump(content, stream)
            except FileExistsError:
                return False
        finally:
            own.unlink(missing_ok=True)
        return True

    def _release_stale(self) -> None:
        """Removes a lock whose process has ended; raises InputError for one that is held."""
        try:
            text, age = self.file.read_text(encoding="utf-8"), time.time() - self.file.stat().st_mtime
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.file}: expected a lock file, got what cannot be read ({error}); delete it"
            ) from error
        try:
            holder = json.loads(text)
            process, host, started = int(holder["process"]), str(holder["host"]), float(holder["started"])
        except (ValueError, KeyError, TypeError, OverflowError):
            process, host, started = 0, "an unknown host", 0.0
        if host == socket.gethostname():
            alive = process > 0 and _alive(process, started)
        else:  # one that cannot be read is being written at this moment, or was when its process ended
            alive = age < (STALE if process else UNREADABLE)
        if alive:
            raise InputError(
                f"{self.file.parent}: process {process} on {host} is training in it; wait for its end, stop it, or "
                f"choose another output_dir (if that process is gone, delete {self.file})"
            )
        taken = self.file.with_name(f"{LOCK_FILE}.stale.{os.getpid()}")
        try:
            self.file.rename(taken)
        except FileNotFoundError:
            return
        if taken.read_text(encoding="utf-8") != text:  # another process took it first: give it back
            os.link(taken, self.file)
        else:
            logger.warning("%s: process %s on %s ended without releasing it; taken over", self.file, process, host)
        taken.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            if self.file.exists():
                os.utime(self.file)


def _alive(process: int, started: float) -> bool:
    """Whether the process that started then still runs; its number may have been given to another one since."""
    try:
        found = psutil.Process(process)
        return abs(found.create_time() - started) < 2 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
