"""Writing the page without harming what is there."""

import contextlib
import os
import stat
from pathlib import Path

from lightning_stosign.inspection.page import GENERATOR


class PageFileError(ValueError):
    """The page cannot be written there; the message is one line."""


def check_page_file(path: Path) -> None:
    """Raise unless the page can be written: to a new file, or in place of an earlier page.

    Raises:
        PageFileError: something else is there, a link included, or the folder is not.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise PageFileError(f"{path} cannot be written: No such file or directory") from None
        return
    except (OSError, ValueError) as error:
        raise PageFileError(f"{path} cannot be written: {_reason(error)}") from error
    if stat.S_ISLNK(status.st_mode):
        raise PageFileError(f"{path} is a link: name a new file, or an earlier page")
    if not stat.S_ISREG(status.st_mode) or not _is_page(path):
        raise PageFileError(f"{path} exists and is no page of inspect: it is not overwritten")


def write_page(path: Path, page: str) -> None:
    """Write a page; an earlier one is replaced as a whole, and nothing else is.

    Raises:
        PageFileError: as of :func:`check_page_file`, or the disk is full.
    """
    check_page_file(path)
    data = page.encode("utf-8", "backslashreplace")
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}")
    try:
        if os.path.lexists(path):
            _create(temporary, data)
            os.replace(temporary, path)
        else:
            _create(path, data)
    except FileExistsError as error:
        raise PageFileError(f"{path} exists and is no page of inspect: it is not overwritten") from error
    except OSError as error:
        raise PageFileError(f"{path} cannot be written: {_reason(error)}") from error


def _create(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, not even as a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(1000)
    except OSError:
        return False


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
