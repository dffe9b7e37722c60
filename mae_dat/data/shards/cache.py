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
from collections.abc import Iterator
from pathlib import Path

from mae_dat.config.errors import ConfigError, DataError, DownloadError
from mae_dat.config.extras import require_extra
from mae_dat.data.shards.index import INDEX_FILE
from mae_dat.storage.download import UrlFailedError, download
from mae_dat.storage.files import home_folder, prepare_output_folder, sha256_of

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

    An index is downloaded once and kept, so a resumed run finds the same order of images. Raises DownloadError.
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
    if index.is_file():
        return
    prepare_output_folder(folder)
    (folder / _ORIGIN).write_text(source)
    try:
        with _locked(index):
            if not index.is_file():
                _fetch(f"{source}/{INDEX_FILE}", index)
    except UrlFailedError:
        (folder / _ORIGIN).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _lock_path(index).unlink()
            folder.rmdir()  # or the split would seem to exist
        raise


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


def _fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Download a file next to `path`, check its sha256, and rename it to `path`."""
    partial = path.with_name(f".{path.name}.partial")
    if url.startswith("http"):
        download(url, partial, path.name)
    else:
        _stream(url, partial, _LARGEST_INDEX if size is None else size)
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
                    raise UrlFailedError("it is longer than the index says")
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
    with _lock_path(path).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
