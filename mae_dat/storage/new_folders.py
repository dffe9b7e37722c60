"""Folders that a command creates and leaves empty when it fails: they are removed again."""

import contextlib
import contextvars
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".lease.lock"
"""The file of the lock of an output folder."""
_NOTHING_WRITTEN = {LOCK_FILE, "inputs.json"}
"""A folder with nothing but these files counts as empty: the lock, and the summary of the inputs."""
_created: contextvars.ContextVar[list[Path] | None] = contextvars.ContextVar("created", default=None)


def create_folder(folder: Path) -> None:
    """Create a folder and its parents, and remember which ones are new. Raises OSError."""
    created = _created.get()
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if created is not None:
        created.extend(path.absolute() for path in reversed(new))


@contextlib.contextmanager
def empty_folders_removed() -> Iterator[None]:
    """Remove the folders that the block created and wrote nothing to, if it raises an error or is interrupted."""
    created: list[Path] = []
    token = _created.set(created)
    try:
        yield
    except BaseException:
        for folder in reversed(created):  # those inside others first
            with contextlib.suppress(OSError):  # not empty, or removed already
                files = list(folder.iterdir())
                if {path.name for path in files} <= _NOTHING_WRITTEN:
                    for path in files:
                        path.unlink()
                folder.rmdir()
        raise
    finally:
        _created.reset(token)
