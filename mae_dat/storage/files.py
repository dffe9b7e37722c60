"""Atomic writing, checksums, and a check before a run starts that its output folder is writable."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mae_dat.config.errors import DISK_FULL, MissingInputError, OutputError, StorageError, UserError
from mae_dat.storage.new_folders import create_folder

HOME_VARIABLE = "MAE_DAT_HOME"
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)


def home_folder() -> Path:
    """Return the folder of downloads and caches: $MAE_DAT_HOME, or ~/.cache/mae_dat if it is not set.

    Raises MissingInputError where this user has no home folder, as in some containers.
    """
    try:
        return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".cache" / "mae_dat")
    except RuntimeError as error:
        raise MissingInputError(
            f"this user has no home folder for downloads and caches: set {HOME_VARIABLE} to a folder."
        ) from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path, need: int = 0) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`; on success it is synced to disk and replaces `path`, else it is removed.

    Readers see either the old content or the new, never a part of it; an existing file survives a full disk and a kill
    at any time. `need` is the number of bytes that will be written, if known: if they do not fit, nothing is written.
    Raises StorageError, with path, needed and free bytes, for a full disk and any other failed write.
    """
    try:
        if need > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, "no space left")
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise storage_error(path, error, need) from error
    os.close(handle)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        fault = _write_fault(error)
        if fault is None:
            raise
        raise storage_error(path, fault, need) from error


def open_lock_file(path: Path) -> BinaryIO:
    """Open a file for locking, and create it if needed; its content stays.

    Links are not followed, because another user may have put one there. Raises OutputError for one, StorageError.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OutputError(f"the lock file {path} is a link, which is not followed: remove it.") from error
        raise storage_error(path, error) from error
    return os.fdopen(descriptor, "r+b", buffering=0)


def is_web_page(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a web page, a frequent result of a failed download."""
    return _WEB_PAGE.match(start) is not None


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, which makes a rename in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_fault(error: BaseException) -> Exception | None:
    """Return the failed write that caused an error, or None: `torch.save` wraps it in a RuntimeError."""
    if isinstance(error, OSError):
        return error
    if not isinstance(error, RuntimeError):
        return None
    if isinstance(error.__context__, OSError):
        return error.__context__
    return error if any(name in str(error) for name in ("PytorchStreamWriter", "inline_container")) else None


def storage_error(path: Path, error: Exception, need: int = 0) -> StorageError:
    """Return the StorageError for a failed write of `need` bytes, with the cause and the free space."""
    if not path.parent.is_dir():
        return StorageError(f"could not write {path}: there is no folder {path.parent}. Create it first.")
    free = shutil.disk_usage(path.parent).free
    code = error.errno if isinstance(error, OSError) else None
    cause = DISK_FULL.get(code, str(error)) if code else str(error)
    needed = f"{need:,} bytes needed, " if need else ""
    return StorageError(
        f"could not write {path}: {cause} ({needed}{free:,} bytes free there). Earlier files are intact."
    )


def prepare_output_folder(folder: Path, instead: str = "another --output_dir") -> Path:
    """Create `folder`, check that files in it can be written, synced, renamed and deleted, and return it.

    Raises OutputError with the cause, and the advice to choose `instead`.
    """
    try:
        create_folder(folder)
        # A name as long as our longest one, to detect a path that is too long for the system.
        handle, name = tempfile.mkstemp(prefix=".checkpoint-00000000.pth.probe.", suffix=".tmp", dir=folder)
        with open(handle, "wb") as probe:
            probe.write(b"mae_dat")
            probe.flush()
            os.fsync(probe.fileno())
        written = Path(name)
        written.replace(written.with_suffix(".renamed.tmp")).unlink()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise OutputError(f"cannot write to the output folder {folder}: {cause}. Choose {instead}.") from error
    return folder


def require_file(path: Path, what: str, error: type[UserError] = MissingInputError) -> Path:
    """Return `path` if it is a file; otherwise raise `error`, with a message that begins with `what`, its purpose."""
    if path.is_dir():
        raise error(f"{what}: {path} is a folder, not a file.")
    if not path.is_file():
        raise error(f"{what}: no such file: {path}")
    return path
