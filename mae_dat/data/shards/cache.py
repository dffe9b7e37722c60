"""A local cache of shards on a server: filled as shards are needed, and kept below a size.

A local folder takes the place of the address. The cache is `shards` in $MAE_DAT_HOME or else ~/.cache/mae_dat, up to
$MAE_DAT_SHARDS_GB (100). One process of a node downloads a shard while the others wait; the shard is used only if it
has the sha256 of the index.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mae_dat.config.errors import ConfigError, DataError, DownloadError
from mae_dat.config.extras import require_extra
from mae_dat.data.shards.index import INDEX_FILE, read_index
from mae_dat.storage.download import UrlFailedError, download
from mae_dat.storage.files import atomic_write, home_folder, open_lock_file, prepare_output_folder, sha256_of

logger = logging.getLogger(__name__)

_LIMIT_VARIABLE = "MAE_DAT_SHARDS_GB"
_LIMIT_GB = 100.0
_LARGEST_INDEX = 1 << 34  # bytes
_SCHEMES = ("https://", "http://", "gs://", "hf://", "ais://")
_ORIGIN = ".origin"


def is_remote(path: str) -> bool:
    """Return whether a data path is an address. Raises ConfigError for an address of an unsupported kind."""
    if "://" not in path and not path.startswith("pipe:"):
        return False
    if not path.startswith(_SCHEMES):
        raise ConfigError(f"--data_path {path}: shards are read from {', '.join(_SCHEMES)} or a folder.")
    return True


def cache_folder() -> Path:
    """Return the folder of downloaded shards."""
    return home_folder() / "shards"


def remote_root(url: str) -> Path:
    """Return the local folder for `url`, with the indices of URL/train and URL/val, or of URL itself.

    An index is downloaded once and kept, so a resumed run finds the same order of images; a damaged one is downloaded
    again. Raises DownloadError.
    """
    url = url.rstrip("/")
    if url.startswith("http://"):
        logger.warning("%s is not encrypted: the images can be changed on the way. Better use https.", url)
    root = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
    reasons = []
    for split in ("train", "val", ""):
        if split == "" and any(root.glob(f"*/{INDEX_FILE}")):
            break
        source = f"{url}/{split}".rstrip("/")
        try:
            _download_index(source, root / split)
        except UrlFailedError as error:
            reasons.append(f"\n  {source}/{INDEX_FILE}: {error}")
    if not any(root.glob(f"**/{INDEX_FILE}")):
        raise DownloadError(f"{url} has no index of shards; mae-dat pack writes one.{''.join(reasons)}")
    return root


def _download_index(source: str, folder: Path) -> None:
    """Download the index of one split, unless it is there. Raises UrlFailedError, and then leaves no folder behind."""
    index = folder / INDEX_FILE
    if _is_valid_index(index):
        return
    prepare_output_folder(folder)
    with atomic_write(folder / _ORIGIN) as file:
        file.write(source.encode())
    try:
        with _locked(index):
            if not _is_valid_index(index):
                _fetch(f"{source}/{INDEX_FILE}", index, check=_check_index)
    except UrlFailedError:
        (folder / _ORIGIN).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _lock_path(index).unlink()
            folder.rmdir()  # or the split would seem to exist
        raise


def _is_valid_index(index: Path) -> bool:
    """Return whether a usable index is in the cache; report one that is damaged."""
    if not index.is_file():
        return False
    try:
        read_index(index.parent)
    except DataError as error:
        logger.warning("%s Downloading it again.", str(error).partition(";")[0] + ".")
        return False
    return True


def _check_index(partial: Path) -> None:
    """Raise UrlFailedError for a downloaded file that is not an index of shards."""
    try:
        read_index(partial.parent, partial.name)
    except DataError as error:
        cause = str(error).partition(";")[0].replace(str(partial), "the file")
        raise UrlFailedError(f"it is not an index of shards ({cause})") from error


def origin_of(folder: Path) -> str | None:
    """Return the address that a folder of the cache was downloaded from; None for any other folder."""
    try:
        return (folder / _ORIGIN).read_text()
    except OSError:
        return None


def download_shard(origin: str, path: Path, size: int, sha256: str) -> None:
    """Download one shard of `size` bytes into the cache.

    Raises DownloadError, DataError for a file that is not the one of the index, and StorageError on a full disk.
    """
    with _locked(path):
        if path.is_file():  # another process has downloaded it while this one waited
            return
        _make_room(size)
        try:
            _fetch(f"{origin}/{path.name}", path, size, sha256)
        except UrlFailedError as error:
            raise DownloadError(f"{origin}/{path.name} could not be downloaded: {error}") from error


def _fetch(
    url: str,
    path: Path,
    size: int | None = None,
    sha256: str | None = None,
    check: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Download a file next to `path`, compare its sha256 and call `check`, and rename it to `path`.

    A file that fails a check is deleted.
    """
    partial = path.with_name(f".partial.{path.name}")
    largest = _LARGEST_INDEX if size is None else size
    if url.startswith("http"):
        download(url, partial, path.name, largest)
    else:
        _stream(url, partial, largest)
    try:
        check(partial)
    except UrlFailedError:
        partial.unlink(missing_ok=True)
        raise
    if sha256 and (actual := sha256_of(partial)) != sha256:
        partial.unlink()
        raise DataError(f"{url} is not the shard of the index: its sha256 is {actual}, not {sha256}; it was not used")
    partial.replace(path)


def _stream(url: str, partial: Path, max_bytes: int) -> None:
    """Download with webdataset, which runs the store's own program (gsutil, curl, ais)."""
    require_extra("shards", url)
    from webdataset.gopen import gopen

    remaining = max_bytes
    try:
        with gopen(url, "rb") as source, partial.open("wb") as target:
            while chunk := source.read(1 << 20):
                remaining -= len(chunk)
                if remaining < 0:
                    raise UrlFailedError(f"it has more than the {max_bytes:,} bytes allowed")
                target.write(chunk)
    except OSError as error:
        raise UrlFailedError(str(error)) from error


def _make_room(size: int) -> None:
    """Delete the shards that were downloaded first, until another one fits the limit; open ones stay readable."""
    try:
        limit = float(os.environ.get(_LIMIT_VARIABLE, _LIMIT_GB)) * 1e9
    except ValueError as error:
        raise ConfigError(f"{_LIMIT_VARIABLE} must be a number of GB, not {os.environ[_LIMIT_VARIABLE]!r}.") from error
    shards = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in cache_folder().glob("**/*.tar"))
    total = sum(length for _, length, _ in shards) + size
    for _, length, path in shards:
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= length
        logger.info("deleted %s from the cache, which may hold %.0f GB (%s)", path.name, limit / 1e9, _LIMIT_VARIABLE)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file that may not exist yet. The system releases the lock when the process dies."""
    with open_lock_file(_lock_path(path)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
