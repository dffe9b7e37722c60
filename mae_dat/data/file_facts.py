"""Facts about files that show whether they were replaced under the same names: sizes, times and a hash of the content.

A replaced file has another inode or a later change time (ctime), which programs cannot set. So where all of these are
the same, nothing is read. Where they differ, for instance after a copy, the content decides: of at most 1 GB all of it;
of more, samples, and a set of which only a part was written anew counts as replaced.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NotRequired, TypedDict

WHOLE_BYTES = 1 << 30
"""Files of up to this size in total are always hashed as a whole."""
_SAMPLES = 1024
"""Blocks of larger sets that are read, spread evenly over the files; at least the first of each of 1,024 files."""
_SAMPLE_BYTES = 1 << 16
_SAMPLED = "sampled:"  # marks the hash of samples
_GROUPS = 256  # of neighboring files whose times are recorded together
_GROUP_DIGITS = 16
_CONTENTS: dict[str, str] = {}
"""Hashes that this process has computed, by paths, sizes and times: many measurements read the same images."""
_THREADS = 4  # hashing releases the GIL, and files on a network answer slowly


class FileFacts(TypedDict):
    """Hashes of the sizes, modification times and contents of files, in order."""

    sizes: str
    times: str
    content: str
    """`sampled:` and a hash of samples, or a hash of everything."""
    states: NotRequired[str]
    """Hash of size, modification time, change time and inode of all files. Older releases did not record it."""
    groups: NotRequired[list[str]]
    """The same for up to 256 groups of neighboring files, where the content is sampled."""


class FileState:
    """Files as they are now. Sizes and times are read at once, the content only when it is needed.

    With at most `WHOLE_BYTES`, or if `whole` is set, the content is that of all files; otherwise up to 1,024 blocks of
    64 KiB, evenly spaced. A file that cannot be read counts as one without content.
    """

    def __init__(self, paths: Sequence[str], whole: bool = False) -> None:
        self.paths = paths
        self._stats = list(_stat_all(paths))
        self.sizes, self.times = (_hash_of([stat[column] for stat in self._stats]) for column in (0, 1))
        self.states = _hash_of(self._stats)
        self.newest_ns = max((stat[1] for stat in self._stats), default=0)
        """The latest modification time, in ns."""
        self.whole = whole or sum(stat[0] for stat in self._stats) <= WHOLE_BYTES

    def facts(self, before: FileFacts | None = None) -> FileFacts:
        """Return the facts; with the content of `before` if the files are the same, without reading them."""
        facts = FileFacts(sizes=self.sizes, times=self.times, content="", states=self.states)
        if not self.whole:
            facts["groups"] = self._groups()
        facts["content"] = before["content"] if before and self._is_same(before) else self._content()
        return facts

    def _is_same(self, before: FileFacts) -> bool:
        if "states" in before:
            return before["states"] == self.states
        return (before["sizes"], before["times"]) == (self.sizes, self.times)  # of an older release

    def _groups(self) -> list[str]:
        count = min(_GROUPS, len(self._stats))
        ends = [number * len(self._stats) // count for number in range(count + 1)]
        return [_hash_of(self._stats[start:end])[:_GROUP_DIGITS] for start, end in itertools.pairwise(ends)]

    def _content(self) -> str:
        key = _hash_of([*self.paths, self.states, self.whole])
        if key not in _CONTENTS:
            _CONTENTS[key] = _hash_of(_hash_all(self.paths)) if self.whole else _SAMPLED + self._sampled()
        return _CONTENTS[key]

    def _sampled(self) -> str:
        count = min(len(self.paths), _SAMPLES)
        chosen = [index * len(self.paths) // count for index in range(count)]
        blocks = max(1, _SAMPLES // count)
        starts = [_block_starts(self._stats[index][0], blocks) for index in chosen]
        with ThreadPoolExecutor(_THREADS) as pool:
            return _hash_of(list(pool.map(_hash_blocks, [self.paths[index] for index in chosen], starts)))


def file_facts(paths: Sequence[str], before: FileFacts | None = None) -> FileFacts:
    """Return the facts of files; those of `before` if sizes and times are the same, without reading any content."""
    return FileState(paths).facts(before)


def content_sha256(paths: Sequence[str]) -> str:
    """Return a hash of the sizes and the content of files."""
    facts = file_facts(paths)
    return _hash_of([facts["sizes"], facts["content"]])


def replaced(before: FileFacts, now: FileFacts) -> bool:
    """Return whether the files of `now` have other content than those of `before`.

    Where the content is sampled, also whether only a part of the files was written anew: that is no copy of the set.
    """
    if before["sizes"] != now["sizes"]:
        return True
    # Hashes of samples and of everything cannot be compared; older releases sampled in another way.
    comparable = before["content"].startswith(_SAMPLED) == now["content"].startswith(_SAMPLED)
    if comparable and before["content"] != now["content"]:
        return True
    pairs = list(zip(before.get("groups", []), now.get("groups", []), strict=False))
    return 0 < sum(old != new for old, new in pairs) < len(pairs)


def _hash_of(values: Sequence[object]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(map(str, values)))).hexdigest()


def _stat_all(paths: Sequence[str]) -> Iterator[tuple[int, int, int, int]]:
    """Yield size in bytes, modification time and change time in ns, and inode of every file; zeros for a missing
    one."""
    for path in paths:
        try:
            state = os.stat(path)
        except (OSError, ValueError):
            yield 0, 0, 0, 0
        else:
            yield state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def _hash_all(paths: Sequence[str]) -> list[str]:
    """Return the sha256 of every file."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_hash_file, paths, chunksize=64))


def _hash_file(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return ""


def _block_starts(size: int, blocks: int) -> list[int]:
    """Return where to read up to `blocks` blocks of a file: the first, the last and evenly spaced ones between."""
    if blocks == 1 or size <= _SAMPLE_BYTES:
        return [0]
    return sorted({number * (size - _SAMPLE_BYTES) // (blocks - 1) for number in range(blocks)})


def _hash_blocks(path: str, starts: Sequence[int]) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            for start in starts:
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, start))
    except (OSError, ValueError):
        return ""
    return digest.hexdigest()
