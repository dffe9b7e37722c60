"""Files that are whole or absent: atomic writing, checksums, and a probe of the output folder before hours are
spent."""

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

from mae_dat.config.errors import MissingInputError, OutputError, StorageError, UserError

HOME_VARIABLE = "MAE_DAT_HOME"
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_DISK_FULL = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "no space left for a file of this size",
}


def home_folder() -> Path:
    """Return the folder of downloads and caches: $MAE_DAT_HOME, or ~/.cache/mae_dat where it is not set."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".cache" / "mae_dat")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path, need: int = 0) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`; on success it is synced and takes the place of `path`, on failure it is
    removed.

    Readers see the old content or the new, never a part; a previous file survives a full disk and a kill at any
    instant. `need` are the bytes that will be written, if known: nothing is begun where they do not fit. Raises
    StorageError, naming path, need and free bytes, when the disk is full, and on any other write fault.
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


def is_web_page(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a web page, as failed downloads leave behind."""
    return _WEB_PAGE.match(start) is not None


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_fault(error: BaseException) -> Exception | None:
    """The fault of writing behind an error, if there is one: `torch.save` covers a full disk by a RuntimeError of its
    own."""
    if isinstance(error, OSError):
        return error
    if not isinstance(error, RuntimeError):
        return None
    if isinstance(error.__context__, OSError):
        return error.__context__
    return error if any(name in str(error) for name in ("PytorchStreamWriter", "inline_container")) else None


def storage_error(path: Path, error: Exception, need: int = 0) -> StorageError:
    """The error for a write of `need` bytes that failed: full disks by name, anything else by its own words."""
    if not path.parent.is_dir():
        return StorageError(f"could not write {path}: there is no folder {path.parent}. Create it first.")
    free = shutil.disk_usage(path.parent).free
    code = error.errno if isinstance(error, OSError) else None
    cause = _DISK_FULL.get(code, str(error)) if code else str(error)
    needed = f"{need:,} bytes needed, " if need else ""
    return StorageError(
        f"could not write {path}: {cause} ({needed}{free:,} bytes free there). What was saved before is intact."
    )


def prepare_output_folder(folder: Path, instead: str = "another with --output_dir or --output") -> Path:
    """Creates `folder` and proves that files in it can be written, synced, renamed and deleted. Raises OutputError with
    the cause and what to choose instead otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # As long a name as any of ours: a path near the limit may not leave room for it.
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
    """Returns `path` if it is a file; otherwise raises `error`, saying what was looked for."""
    if path.is_dir():
        raise error(f"{what}: {path} is a folder, a file is needed.")
    if not path.is_file():
        raise error(f"{what}: no such file: {path}")
    return path
