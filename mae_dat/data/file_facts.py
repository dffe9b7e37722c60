"""Facts about files that show whether they were replaced under the same names: sizes, times and a hash of the content.

Sizes and times are compared first. The content is read only where they leave a doubt, for instance after a copy.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

WHOLE_BYTES = 1 << 30
"""Files of up to this size in total are always hashed as a whole."""
_SAMPLED_FILES = 1024
_SAMPLED_BYTES = 1 << 16
_CONTENTS: dict[str, str] = {}
"""Hashes that this process has computed, by paths, sizes and times: many measurements read the same images."""
_THREADS = 4  # hashing releases the GIL, and files on a network answer slowly


class FileFacts(TypedDict):
    """Hashes of the sizes, modification times and contents of files, in order."""

    sizes: str
    times: str
    content: str


class FileState:
    """Files as they are now. Sizes and times are read at once, the content only when it is needed.

    With at most `WHOLE_BYTES`, or if `whole` is set, the content is that of all files; otherwise the starts of up to
    1,024 files, evenly spaced. A file that cannot be read counts as one without content.
    """

    def __init__(self, paths: Sequence[str], whole: bool = False) -> None:
        self.paths = paths
        states = list(_stat_all(paths))
        self.sizes, self.times = (_hash_of([state[column] for state in states]) for column in (0, 1))
        self.newest_ns = max((time for _, time in states), default=0)
        """The latest modification time, in ns."""
        self.whole = whole or sum(size for size, _ in states) <= WHOLE_BYTES

    def facts(self, before: FileFacts | None = None) -> FileFacts:
        """Return the facts; those of `before` if sizes and times are the same, without reading any content."""
        if before is not None and (before["sizes"], before["times"]) == (self.sizes, self.times):
            return before
        return FileFacts(sizes=self.sizes, times=self.times, content=self._content())

    def _content(self) -> str:
        key = _hash_of([*self.paths, self.sizes, self.times, self.whole])
        if key not in _CONTENTS:
            count = len(self.paths) if self.whole else min(len(self.paths), _SAMPLED_FILES)
            chosen = [self.paths[index * len(self.paths) // count] for index in range(count)]
            _CONTENTS[key] = _hash_of(_hash_all(chosen, -1 if self.whole else _SAMPLED_BYTES))
        return _CONTENTS[key]


def file_facts(paths: Sequence[str], before: FileFacts | None = None) -> FileFacts:
    """Return the facts of files; those of `before` if sizes and times are the same, without reading any content."""
    return FileState(paths).facts(before)


def content_sha256(paths: Sequence[str]) -> str:
    """Return a hash of the sizes and the content of files."""
    facts = file_facts(paths)
    return _hash_of([facts["sizes"], facts["content"]])


def replaced(before: FileFacts, now: FileFacts) -> bool:
    """Return whether the files of `now` have other content than those of `before`."""
    return (before["sizes"], before["content"]) != (now["sizes"], now["content"])


def _hash_of(values: Sequence[object]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(map(str, values)))).hexdigest()


def _stat_all(paths: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the size in bytes and the modification time in ns of every file; zeros for one that is not there."""
    for path in paths:
        try:
            state = os.stat(path)
        except (OSError, ValueError):
            yield 0, 0
        else:
            yield state.st_size, state.st_mtime_ns


def _hash_all(paths: Sequence[str], length: int) -> list[str]:
    """Return the sha256 of the first `length` bytes (all if negative) of every file."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda path: _hash_start(path, length), paths, chunksize=64))


def _hash_start(path: str, length: int) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            if length >= 0:
                return hashlib.sha256(file.read(length)).hexdigest()
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return ""
