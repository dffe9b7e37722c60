"""Shards that lie on a server: a local folder stands for them, filled as they are needed and kept below a size.

The cache is `shards` in $MAE_DAT_HOME or else ~/.cache/mae_dat, up to $MAE_DAT_SHARDS_GB (100). A shard is downloaded
by one process of a node while the others wait, and takes its place only with the sha256 of the index.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from mae_dat.config.errors import ConfigError, DataError, DownloadError
from mae_dat.storage.download import UrlFailedError, download
from mae_dat.storage.files import home_folder, prepare_output_folder, sha256_of

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "MAE_DAT_SHARDS_GB"
LIMIT_GB = 100.0
SCHEMES = ("https://", "http://", "gs://", "hf://", "ais://")
_INDEX = "index.safetensors"
_ORIGIN = ".origin"


def is_remote(path: str) -> bool:
    """Whether a data path is an address. Raises ConfigError for one that is not supported."""
    if "://" not in path and not path.startswith("pipe:"):
        return False
    if not path.startswith(SCHEMES):
        raise ConfigError(f"--data_path {path}: shards are read from {', '.join(SCHEMES)} or a folder.")
    return True


def cache_folder() -> Path:
    """The folder of downloaded shards."""
    return home_folder() / "shards"


def remote_root(url: str) -> Path:
    """The folder that stands for `url`, with the indices of URL/train and URL/val, or of URL itself.

    An index is downloaded once and kept, so that a run which resumes finds the same order. Raises DownloadError.
    """
    url = url.rstrip("/")
    if url.startswith("http://"):
        logger.warning("%s is not encrypted: who is on the way can change the pictures. Better https.", url)
    root = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
    reasons = []
    for split in ("train", "val", ""):
        source, folder = f"{url}/{split}".rstrip("/"), root / split
        if split == "" and any(root.glob(f"*/{_INDEX}")):
            break
        if not (folder / _INDEX).is_file():
            prepare_output_folder(folder)
            (folder / _ORIGIN).write_text(source)
            try:
                with _one_process(folder / _INDEX):
                    if not (folder / _INDEX).is_file():
                        _fetch(f"{source}/{_INDEX}", folder / _INDEX)
            except UrlFailedError as error:
                reasons.append(f"\n  {source}/{_INDEX}: {error}")
                (folder / _ORIGIN).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    (folder / f".{_INDEX}.lock").unlink()
                    folder.rmdir()  # or the split would seem to be there
    if not any(root.glob(f"**/{_INDEX}")):
        raise DownloadError(f"{url} gave no index of shards; python -m mae_dat pack writes it.{''.join(reasons)}")
    return root


def origin_of(folder: Path) -> str | None:
    """The address that a folder of the cache stands for; None for any other folder."""
    try:
        return (folder / _ORIGIN).read_text()
    except OSError:
        return None


def download_shard(origin: str, path: Path, size: int, sha256: str) -> None:
    """Fetches one shard into the cache. Raises DownloadError, DataError for one that is not what the index says, and
    StorageError on a full disk."""
    with _one_process(path):
        if path.is_file():  # another process has fetched it meanwhile
            return
        _make_room(size)
        try:
            _fetch(f"{origin}/{path.name}", path, size, sha256)
        except UrlFailedError as error:
            raise DownloadError(f"{origin}/{path.name} could not be downloaded: {error}") from error


def _fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    partial = path.with_name(f".{path.name}.partial")
    if url.startswith("http"):
        download(url, partial, path.name)
    else:
        _stream(url, partial, size)
    if sha256 and (found := sha256_of(partial)) != sha256:
        partial.unlink()
        raise DataError(f"{url} is not the shard of the index: its sha256 is {found}, not {sha256}; it was not used")
    partial.replace(path)


def _stream(url: str, partial: Path, size: int | None) -> None:
    """Through webdataset, which calls the store's own program (gsutil, curl, ais)."""
    try:
        from webdataset.gopen import gopen
    except ImportError as error:
        raise ConfigError(f"{url} needs the package webdataset: pip install 'mae_dat[shards]'.") from error
    left = (1 << 34) if size is None else size
    try:
        with gopen(url, "rb") as source, partial.open("wb") as target:
            while chunk := source.read(1 << 20):
                left -= len(chunk)
                if left < 0:
                    raise UrlFailedError("more bytes came than the index says")
                target.write(chunk)
    except OSError as error:
        raise UrlFailedError(str(error)) from error


def _make_room(size: int) -> None:
    """Removes the shards that were downloaded first, until another one fits the limit; open ones stay readable."""
    try:
        limit = float(os.environ.get(LIMIT_VARIABLE, LIMIT_GB)) * 1e9
    except ValueError as error:
        raise ConfigError(f"{LIMIT_VARIABLE} must be a number of GB, not {os.environ[LIMIT_VARIABLE]!r}.") from error
    kept = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in cache_folder().glob("**/*.tar"))
    total = sum(length for _, length, _ in kept) + size
    for _, length, path in kept:
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= length
        logger.info("%s left the cache, which may hold %.0f GB (%s)", path.name, limit / 1e9, LIMIT_VARIABLE)


@contextlib.contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """Holds a lock on the file to come; the system releases it when a process dies."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
