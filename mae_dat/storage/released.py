"""Released weights: the list of them, where they are on this machine, and their verified download.

The list is `released_weights.yaml`. `fetch` computes the SHA-256 of a file and compares it before the file is read as
weights. The expected hash comes from the list. If no hash is published, it is recorded when the file is first used on
this machine, in the card of the file (suffix `.json`). One process downloads a file while the others wait, and the file
gets its name only when it is complete and verified.

Importing this module does not import torch.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

import yaml

from mae_dat.config.errors import CheckpointError, ConfigError, DownloadError, MissingInputError, OutputError, suggest
from mae_dat.config.flags import expand_home
from mae_dat.storage.download import UrlFailedError, download
from mae_dat.storage.files import (
    HOME_VARIABLE,
    atomic_write,
    home_folder,
    is_web_page,
    open_lock_file,
    prepare_output_folder,
    sha256_of,
    storage_error,
)
from mae_dat.storage.json_files import read_json

logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "MAE_DAT_MIRROR"
PACKAGE_ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class ReleasedWeights:
    """An entry of `released_weights.yaml`: weights that someone has published, or that are part of this package."""

    name: str
    what: str
    """Description in one line, for `mae-dat list`."""
    kind: Literal["mae", "classifier", "tokenizer", "export"]
    """export: a file written by this package, whose metadata describes the model."""
    model: str
    """Name of the model for `build_mae` or `build_classifier`, or a key of `VQGAN_PRESETS`."""
    file: str
    """File name in the weights folder and in mirrors (the publisher's if it is descriptive); for embedded weights the
    path inside the package."""
    licence: str
    origin: str
    """Address of the page that publishes and describes it."""
    urls: tuple[str, ...] = ()
    sha256: str | None = None
    md5: str | None = None
    """Leading digits of the MD5."""
    size: int | None = None
    """Bytes."""
    embedded: bool = False
    """Whether the file is part of the package."""
    input_size: int = 224
    """Side of the training images in pixels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Statistics by which the model normalizes pixels in [0, 1] (a tokenizer does its own 2x - 1)."""
    nb_classes: int = 1000
    global_pool: bool = True
    decoder: bool = True
    """Whether a masked autoencoder's file contains the decoder."""
    norm_pix: bool = False
    """Whether the decoder predicts pixels normalized by patch."""
    expected: dict[str, float] = dataclasses.field(default_factory=dict)
    """Published numbers, in percent unless the key says otherwise."""

    @property
    def facts(self) -> dict[str, Any]:
        """Description of the model for a file without one, as the metadata of our own files (see `training.export`)."""
        size = {"model": self.model, "input_size": [self.input_size, self.input_size], "in_chans": 3}
        if self.kind == "mae":
            return {"kind": "mae", **size, "norm_pix_loss": self.norm_pix}
        if self.kind == "classifier":
            return {"kind": "classifier", **size, "global_pool": self.global_pool, "nb_classes": self.nb_classes}
        return {}


@functools.cache
def released_weights() -> dict[str, ReleasedWeights]:
    """Return all released weights by name."""
    entries = yaml.safe_load(Path(__file__).with_name("released_weights.yaml").read_text())
    return {name: _parse_entry(name, fields) for name, fields in entries.items()}


def _parse_entry(name: str, fields: dict[str, Any]) -> ReleasedWeights:
    tuples = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return ReleasedWeights(name=name, **{**fields, **tuples})


def find_released(name: str) -> ReleasedWeights:
    """Return the released weights of this name. Raises ConfigError with the closest names if there are none."""
    try:
        return released_weights()[name]
    except KeyError:
        raise ConfigError(f"unknown weights {name!r}: {suggest(name, list(released_weights()))}") from None


def local_path(name_or_path: str | Path) -> Path:
    """Return a path unchanged, or the verified file of the released weights of that name.

    An existing file or folder takes precedence over released weights of the same name. Raises MissingInputError with
    the closest names for a bare word that is neither, and the errors of `fetch`.
    """
    path, name = Path(expand_home(name_or_path)), str(name_or_path)
    if not path.exists() and name in released_weights():
        return fetch(released_weights()[name])
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        hint = suggest(name, list(released_weights()))
        advice = hint if hint.startswith("did") else "`mae-dat list` lists the released weights."
        raise MissingInputError(f"no such file or folder, and no released weights of that name: {name}; {advice}")
    return path


def fetch(entry: ReleasedWeights, trust: bool = False, folder: Path | None = None) -> Path:
    """Return the verified file of released weights; download it into the weights folder (or `folder`) if necessary.

    `trust` allows plain http for a file without a known sha256. Raises CheckpointError for a file with the wrong
    content, DownloadError if no URL provides the file, OutputError if the folder cannot be written, and StorageError on
    a full disk.
    """
    candidates = [folder / entry.file] if folder and not entry.embedded else _candidate_paths(entry)
    target = candidates[0]
    for path in candidates:
        if path.is_file():
            return _verify_file(entry, path, downloaded=path == target and not entry.embedded)
    if entry.embedded:
        raise MissingInputError(f"{target} belongs to the package and is missing: install the package again.")
    _create_weights_folder(target.parent)
    with _download_lock(target, entry.name):
        if target.is_file():  # another process has downloaded it in the meantime
            return _verify_file(entry, target)
        _download_from_any_url(entry, target, trust)
    return target


def find_local_file(entry: ReleasedWeights) -> Path | None:
    """Return the unverified path of released weights on this machine; None if they would have to be downloaded."""
    with contextlib.suppress(MissingInputError):  # of a user without a home folder, who has downloaded nothing
        return next((path for path in _candidate_paths(entry) if path.is_file()), None)
    return None


def weights_folder() -> Path:
    """Return the folder of downloaded weights: `weights` in $MAE_DAT_HOME, or in ~/.cache/mae_dat."""
    return home_folder() / "weights"


def _candidate_paths(entry: ReleasedWeights) -> list[Path]:
    """Return the paths to try in order: in the package; or else in the weights folder, then in the mirror folder."""
    if entry.embedded:
        return [PACKAGE_ROOT / entry.file]
    mirror = os.environ.get(MIRROR_VARIABLE)
    if mirror and not Path(mirror).is_dir():
        raise ConfigError(f"{MIRROR_VARIABLE}={mirror}: no such folder; correct or unset it.")
    return [folder / entry.file for folder in (weights_folder(), *([Path(mirror)] if mirror else []))]


def _create_weights_folder(folder: Path) -> None:
    try:
        prepare_output_folder(folder)
    except OutputError as error:
        cause = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise OutputError(
            f"cannot write to the weights folder {folder}: {cause}. Set {HOME_VARIABLE} to another folder."
        ) from error


# ---- verification ----


def _verify_file(entry: ReleasedWeights, path: Path, downloaded: bool = True) -> Path:
    """Return `path` if its SHA-256 is that of the list or of its card; on first use, record it.

    Raises CheckpointError otherwise. A `downloaded` file (not the package's, not the mirror's) is then renamed to .bad.
    """
    card = path.with_suffix(".json")
    if not downloaded and not entry.embedded and not card.is_file():
        card = weights_folder() / card.name  # a mirror may be read-only
    actual, (expected, source) = sha256_of(path), _expected_sha256(entry, card)
    if expected is None:
        if fault := _find_fault(entry, path):
            raise CheckpointError(f"{path} is {fault}; remove it.")
        _create_weights_folder(card.parent)
        _write_card(card, entry, sha256=actual, size=path.stat().st_size, url=None)
        _warn_of_first_use(entry, actual, card)
    elif actual != expected:
        advice = ""
        if downloaded:
            advice = f" and was renamed to {_rename_bad(path, path)}. Run the command again to download it again"
        raise CheckpointError(
            f"{path} has the wrong content: its sha256 is {actual}, but {source} records {expected}. It was not "
            f"loaded{advice}."
        )
    return path


class _Card(TypedDict):
    sha256: str


def _expected_sha256(entry: ReleasedWeights, card: Path) -> tuple[str | None, str]:
    """Return the expected SHA-256, None if unknown, and its source in words. Raises CheckpointError for a bad card."""
    if entry.sha256:
        return entry.sha256, "the registry"
    if not card.is_file() and entry.embedded:
        raise CheckpointError(f"{card} belongs to the package and is missing: install the package again.")
    if not card.is_file():
        return None, ""
    try:
        recorded: str = read_json(card, _Card, "a card")["sha256"]
    except CheckpointError as error:
        raise CheckpointError(f"{error} Restore it, or remove it and the file.") from error
    return recorded, str(card)


def _write_card(card: Path, entry: ReleasedWeights, *, sha256: str, size: int, url: str | None) -> None:
    content = {
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
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def _warn_of_first_use(entry: ReleasedWeights, sha256: str, card: Path) -> None:
    logger.warning(
        "%s: no sha256 is published. The sha256 of this file, %s, is recorded in %s and checked from now on.",
        entry.name,
        sha256,
        card,
    )


def _rename_bad(bad: Path, path: Path) -> Path:
    """Rename a file that failed the checks to PATH.bad, for inspection; it is never loaded."""
    renamed = path.with_name(f"{path.name}.bad")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        bad.replace(renamed)
    return renamed


def _find_fault(entry: ReleasedWeights, path: Path) -> str:
    """Describe what is wrong with a file; empty if it looks like these weights."""
    with path.open("rb") as file:
        start = file.read(64)
    size = path.stat().st_size
    if is_web_page(start):
        return "a web page instead of weights"
    if not (start.startswith((b"PK", b"\x80")) or start[8:9] == b"{"):  # torch's new and old format; safetensors
        return "neither a torch nor a safetensors file"
    if entry.size is not None and size != entry.size:
        return f"{size:,} bytes, not {entry.size:,}"
    if entry.md5 and not (md5 := _md5_of(path)).startswith(entry.md5):
        return f"a file with the md5 {md5}; its publisher's begins with {entry.md5}"
    return ""


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# ---- download ----


@contextlib.contextmanager
def _download_lock(path: Path, name: str) -> Iterator[None]:
    """Hold the lock of a file to be downloaded; the system releases it when the process dies."""
    with open_lock_file(path.parent / f".{path.name}.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is downloading it; waiting.", name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(
                f"{path.parent} is on a file system without locks ({error.strerror}): download {name} beforehand with "
                f"{HOME_VARIABLE} on a local disk, and set {MIRROR_VARIABLE} to the folder of the file."
            ) from error
        yield


def _download_from_any_url(entry: ReleasedWeights, path: Path, trust: bool) -> None:
    """Try the URLs in order; give the first file that passes the checks its name `path`, after writing its card.

    Raises DownloadError with each URL's reason if all fail, and StorageError.
    """
    card = path.with_suffix(".json")
    expected, source = _expected_sha256(entry, card)
    size = f" ({entry.size / 1e6:,.0f} MB)" if entry.size else ""
    logger.warning("%s: downloading %s%s. License: %s.", entry.name, path.name, size, entry.licence)
    reasons: list[str] = []
    for url in entry.urls:
        try:
            if not url.startswith("https://") and not (trust or expected):
                raise UrlFailedError(
                    "not encrypted, and no known sha256: the file could be changed during the transfer. To accept it "
                    f"anyway, run mae-dat get {entry.name} --trust"
                )
            partial = _download_and_unpack(entry, url, path)
        except UrlFailedError as error:
            reasons.append(f"\n  {url}: {error}")
            continue
        sha256, fault = sha256_of(partial), _find_fault(entry, partial)
        if expected not in (None, sha256) and "web page" not in fault:
            fault = f"a file with the sha256 {sha256}; {source} records {expected}"
        if fault:
            reasons.append(f"\n  {url}: gave {fault}. The file was renamed to {_rename_bad(partial, path)}")
            continue
        _write_card(card, entry, sha256=sha256, size=partial.stat().st_size, url=url)
        partial.replace(path)
        if reasons:
            logger.warning("%s: other URLs failed.%s", entry.name, "".join(reasons))
        if expected is None:
            _warn_of_first_use(entry, sha256, card)
        return
    raise DownloadError(
        f"{entry.name} could not be downloaded.{''.join(reasons)}\nFor a machine without network access: run "
        f"`mae-dat get {entry.name} --output_dir DIR` on one with access, copy DIR here and set "
        f"{MIRROR_VARIABLE}=DIR. Or download the file by hand and save it as {path}; it is described at {entry.origin}."
    )


def _download_and_unpack(entry: ReleasedWeights, url: str, path: Path) -> Path:
    """Download a URL, resuming an earlier attempt, and return the checkpoint's temporary file next to `path`."""
    logger.info("%s: from %s", entry.name, urllib.parse.urlsplit(url).netloc)
    partial = path.with_name(f".{path.name}.partial")
    download(url, partial, entry.name)
    return _unpack(partial, path)


def _unpack(partial: Path, path: Path) -> Path:
    """Extract the checkpoint of a zip archive; return any other file as it is (torch's own files are zip archives too).

    Raises UrlFailedError for an archive without exactly one checkpoint, and StorageError.
    """
    if not zipfile.is_zipfile(partial):
        return partial
    unpacked = path.with_name(f".{path.name}.unpacked")
    try:
        with zipfile.ZipFile(partial) as archive:
            names = [name for name in archive.namelist() if Path(name).suffix in (".ckpt", ".pth", ".pkl")]
            if any(Path(name).suffix == ".pkl" for name in names):  # a file of torch.save
                return partial
            if len(names) != 1:
                raise UrlFailedError(f"an archive with {len(names)} checkpoints instead of one")
            with archive.open(names[0]) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UrlFailedError(f"a damaged archive: {error}") from error
    except OSError as error:
        unpacked.unlink(missing_ok=True)
        raise storage_error(unpacked, error) from error
    partial.unlink()
    return unpacked
