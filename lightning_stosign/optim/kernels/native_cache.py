"""The folder of compiled libraries: one per user and machine, which no one else can write.

What is in it is executed, so it is checked before it is used: the folder belongs to the user, and the name of each
library ends with the digest of its content.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_NAME = "lightning_stosign"
_LONGEST_WAIT = 25.0  # seconds, for another process that compiles
_POLL = 0.05


class Unavailable(Exception):
    """Native code cannot be had; the message says why."""


class LibraryCache:
    """Compiled libraries by key; safe to use from several processes at once.

    Raises:
        Unavailable: the folder cannot be made, or others can write to it.
    """

    def __init__(self) -> None:
        self._folder = _private_folder()

    def find(self, key: str) -> Path | None:
        """Return the library of a key; None if there is none. A damaged one is removed."""
        for path in self._folder.glob(f"{key}.*.so"):
            if _is_intact(path):
                return path
            path.unlink(missing_ok=True)
        return None

    def store(self, key: str, library: Path) -> Path:
        """Move a new library, from a folder of :meth:`building`, to its place."""
        path = self._folder / f"{key}.{_digest(library)}.so"
        os.replace(library, path)
        return path

    @contextmanager
    def building(self, key: str) -> Iterator[Path]:
        """Enter alone, and yield an empty folder to compile in.

        Raises:
            Unavailable: another process compiled the same and failed meanwhile, or does not come to an end.
        """
        before = self._failure(key)
        with self._locked():
            after = self._failure(key)
            if after != before and after is not None:
                raise Unavailable(after[1])
            for left in self._folder.glob("build-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            folder = tempfile.mkdtemp(prefix="build-", dir=self._folder)
            try:
                yield Path(folder)
            except Unavailable as reason:
                with contextlib.suppress(OSError):
                    (self._folder / f"{key}.failed").write_text(str(reason))
                raise
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _failure(self, key: str) -> tuple[int, str] | None:
        """Return when and why compiling failed last."""
        path = self._folder / f"{key}.failed"
        try:
            return path.stat().st_mtime_ns, path.read_text()
        except OSError:
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._folder / "lock", "w") as file:
            deadline = time.monotonic() + _LONGEST_WAIT
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise Unavailable(f"another process has held the lock of {self._folder} for {_LONGEST_WAIT:.0f} s")
                time.sleep(_POLL)
            yield


def _try_lock(descriptor: int) -> bool:
    """Lock a file until it is closed, and return whether it is locked; where files have no locks, go on without."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems; libraries are renamed into place, so nothing breaks
        return True
    return True


def _private_folder() -> Path:
    if sys.platform == "win32":
        raise Unavailable("native code is not supported on Windows")
    try:
        folder = _user_cache() / _NAME
        for part in reversed((folder, *folder.parents)):
            if not part.exists():
                part.mkdir(mode=0o700, exist_ok=True)
        folder = folder.resolve()
        found = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home, or a link leads back to itself
        raise Unavailable(f"the cache folder cannot be made ({error})") from error
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or mode & 0o022:
        raise Unavailable(
            f"{folder} (owner {found.st_uid}, mode {mode:o}) is not a folder that only user {os.geteuid()} can write"
        )
    return folder


def _user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given)
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def _is_intact(path: Path) -> bool:
    try:
        return path.name.split(".")[1] == _digest(path)
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
