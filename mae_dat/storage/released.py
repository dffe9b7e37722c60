"""Released weights on disk: shipped, kept in the store, found in a mirror folder, or downloaded.

What `fetch` returns has just been hashed. The hash comes from the registry or, where nobody publishes one, from the
first time that the file was seen here (the card, `FILE.json` in place of the suffix). Nothing is read as weights
before that. A file is downloaded by one process while the others wait, and takes its place at once or not at all.

Importing this module does not import torch.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mae_dat.config.errors import CheckpointError, ConfigError, DownloadError, MissingInputError, OutputError
from mae_dat.config.parse import nearest
from mae_dat.storage.download import UrlFailedError, download
from mae_dat.storage.files import atomic_write, prepare_output_folder, sha256_of, storage_error
from mae_dat.storage.registry import PACKAGE, Released, released

logger = logging.getLogger(__name__)

HOME_VARIABLE = "MAE_DAT_HOME"
MIRROR_VARIABLE = "MAE_DAT_MIRROR"
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)


def local_path(name_or_path: str | Path) -> Path:
    """A path as it is, or the verified file of the released weights of that name; what exists goes before a name.

    Raises MissingInputError with the nearest names for a bare word that is neither, and what `fetch` raises.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if not path.exists() and name in released():
        return fetch(released()[name])
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        hint = nearest(name, list(released()))
        known = hint if hint.startswith("did") else "`python -m mae_dat fetch` lists the released weights."
        raise MissingInputError(f"no such file or folder, and no released weights of that name: {name}; {known}")
    return path


def fetch(entry: Released, trust: bool = False, folder: Path | None = None) -> Path:
    """The verified file of released weights, downloaded into the store (or `folder`) if it is nowhere yet.

    `trust` allows plain http for a file of which no sha256 is known. Raises CheckpointError for a file that is not what
    it was, DownloadError when no URL gives it, StorageError on a full disk.
    """
    places = [folder / entry.file] if folder and not entry.embedded else _places(entry)
    path = places[0]
    for place in places:
        if place.is_file():
            return _verified(entry, place, ours=place == path and not entry.embedded)
    if entry.embedded:
        raise MissingInputError(f"{path} belongs to the package and is missing: install the package again.")
    _make(path.parent)
    with _one_process(path, entry.name):
        if path.is_file():  # another process has fetched it meanwhile
            return _verified(entry, path)
        _download_from_any(entry, path, trust)
    return path


def find_local(entry: Released) -> Path | None:
    """Where released weights lie on this machine, not verified; None if they would have to be downloaded."""
    return next((place for place in _places(entry) if place.is_file()), None)


def store() -> Path:
    """The folder of downloaded weights: `weights` in $MAE_DAT_HOME or else ~/.cache/mae_dat."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".cache" / "mae_dat") / "weights"


def _places(entry: Released) -> list[Path]:
    """Where released weights may lie, in this order: the package; or the store, then the mirror folder."""
    if entry.embedded:
        return [PACKAGE / entry.file]
    mirror = os.environ.get(MIRROR_VARIABLE)
    if mirror and not Path(mirror).is_dir():
        raise ConfigError(f"{MIRROR_VARIABLE}={mirror}: there is no such folder; correct or unset it.")
    return [folder / entry.file for folder in (store(), *([Path(mirror)] if mirror else []))]


def _make(folder: Path) -> None:
    try:
        prepare_output_folder(folder)
    except OutputError as error:
        cause = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise OutputError(f"cannot write to {folder}, the folder of weights: {cause}. Set {HOME_VARIABLE}.") from error


# ---- verification ----


def _verified(entry: Released, path: Path, ours: bool = True) -> Path:
    """The path, if the file is what the registry or its card says.

    CheckpointError otherwise, and a file of `ours` (not the package's, not the mirror's) is put aside.
    """
    card = path.with_suffix(".json")
    if not ours and not entry.embedded and not card.is_file():
        card = store() / card.name  # a mirror may be read-only
    found, (expected, source) = sha256_of(path), _expected(entry, card)
    if expected is None:
        if fault := _fault(entry, path):
            raise CheckpointError(f"{path} is {fault}; remove it.")
        _make(card.parent)
        _write_card(card, entry, found, path.stat().st_size, url=None)
        _say_first_use(entry, found, card)
    elif found != expected:
        aside = f"; it is now {_put_aside(path, path)}. Run the command again to fetch it afresh" if ours else ""
        raise CheckpointError(
            f"{path} is not what it should be: its sha256 is {found}, {source} says {expected}. It was not "
            f"loaded{aside}."
        )
    return path


def _expected(entry: Released, card: Path) -> tuple[str | None, str]:
    """The sha256 that a file must have, if one is known, and who says so."""
    if entry.sha256:
        return entry.sha256, "the registry"
    if not card.is_file() and entry.embedded:
        raise CheckpointError(f"{card} belongs to the package and is missing: install the package again.")
    if not card.is_file():
        return None, ""
    try:
        return str(json.loads(card.read_text())["sha256"]), str(card)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the card {card} is damaged ({error}): restore it, or remove it and the file."
        ) from error


def _write_card(card: Path, entry: Released, sha256: str, size: int, url: str | None) -> None:
    facts = {
        "sha256": sha256,
        "sha256_from": "registry" if entry.sha256 else "first use",
        "name": entry.name,
        "url": url,
        "size": size,
        "licence": entry.licence,
        "origin": entry.origin,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with atomic_write(card) as file:
        file.write(json.dumps(facts, indent=1).encode() + b"\n")


def _say_first_use(entry: Released, sha256: str, card: Path) -> None:
    logger.warning(
        "%s: nobody publishes a sha256. That of this file, %s, is in %s and checked from now on.",
        entry.name,
        sha256,
        card,
    )


def _put_aside(bad: Path, path: Path) -> Path:
    """Renames a bad file to NAME.bad, where nothing loads it and someone can look at it."""
    aside = path.with_name(f"{path.name}.bad")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        bad.replace(aside)
    return aside


# ---- download ----


@contextlib.contextmanager
def _one_process(path: Path, name: str) -> Iterator[None]:
    """Holds a lock on the file to come; the system releases it when a process dies."""
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is fetching it; waiting.", name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(
                f"{path.parent} is on a file system without locks ({error.strerror}): fetch {name} beforehand with "
                f"{HOME_VARIABLE} on a local disk, and set {MIRROR_VARIABLE} to the folder of the file."
            ) from error
        yield


def _download_from_any(entry: Released, path: Path, trust: bool) -> None:
    """Tries the URLs in order and puts the first file that passes in place, its card first."""
    card = path.with_suffix(".json")
    known, source = _expected(entry, card)
    size = f" ({entry.size / 1e6:,.0f} MB)" if entry.size else ""
    logger.warning("%s: downloading %s%s. Licence: %s.", entry.name, path.name, size, entry.licence)
    reasons = []
    for url in entry.urls:
        partial = path.with_name(f".{path.name}.partial")
        try:
            if not url.startswith("https://") and not (trust or known):
                raise UrlFailedError(
                    "not encrypted and without a known sha256: anyone on the way could change it. To take it all "
                    f"the same: python -m mae_dat fetch {entry.name} --trust"
                )
            logger.info("%s: from %s", entry.name, urllib.parse.urlsplit(url).netloc)
            download(url, partial, entry.name)
            partial = _unpack(partial, path)
        except UrlFailedError as error:
            reasons.append(f"\n  {url}: {error}")
            continue
        sha256, fault = sha256_of(partial), _fault(entry, partial)
        if known not in (None, sha256) and "web page" not in fault:
            fault = f"a file with the sha256 {sha256}; {source} says {known}"
        if fault:
            reasons.append(f"\n  {url}: gave {fault}. It was put aside as {_put_aside(partial, path)}")
            continue
        _write_card(card, entry, sha256, partial.stat().st_size, url)
        partial.replace(path)
        if reasons:
            logger.warning("%s: other addresses failed.%s", entry.name, "".join(reasons))
        if known is None:
            _say_first_use(entry, sha256, card)
        return
    raise DownloadError(
        f"{entry.name} could not be downloaded.{''.join(reasons)}\nWithout a network: run `python -m mae_dat fetch "
        f"{entry.name} --mirror DIR` where there is one, copy DIR here and set {MIRROR_VARIABLE}=DIR. Or put the file "
        f"here by hand, as {path}; it is described at {entry.origin}."
    )


def _unpack(partial: Path, path: Path) -> Path:
    """The checkpoint in a zip archive, else the file itself (torch's own files are zip archives too)."""
    if not zipfile.is_zipfile(partial):
        return partial
    unpacked = path.with_name(f".{path.name}.unpacked")
    try:
        with zipfile.ZipFile(partial) as archive:
            names = [name for name in archive.namelist() if Path(name).suffix in (".ckpt", ".pth", ".pkl")]
            if any(Path(name).suffix == ".pkl" for name in names):
                return partial
            if len(names) != 1:
                raise UrlFailedError(f"an archive with {len(names)} checkpoints in it, not one")
            with archive.open(names[0]) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UrlFailedError(f"a damaged archive: {error}") from error
    except OSError as error:
        unpacked.unlink(missing_ok=True)
        raise storage_error(unpacked, error) from error
    partial.unlink()
    return unpacked


def _fault(entry: Released, path: Path) -> str:
    """What a file that should be these weights is instead; empty if it looks like them."""
    with path.open("rb") as file:
        start = file.read(64)
    size = path.stat().st_size
    if _WEB_PAGE.match(start):
        return "a web page instead of weights"
    if not (start.startswith((b"PK", b"\x80")) or start[8:9] == b"{"):  # torch, old and new; safetensors
        return "a file that is neither torch's nor safetensors'"
    if entry.size is not None and size != entry.size:
        return f"{size:,} bytes, not {entry.size:,}"
    if entry.md5 and not (md5 := _md5_of(path)).startswith(entry.md5):
        return f"a file with the md5 {md5}; its publisher's begins with {entry.md5}"
    return ""


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
