"""Which output of a model belongs to which class folder.

Folders are matched to outputs by name, never by their position among the folders that happen to be there: by the names
stored with the model, by ImageNet's WordNet ids, or by numbers. Only where none of these is known, and there are as
many folders as outputs, is the order of the sorted names used, as in torchvision's ImageFolder.
"""

import functools
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mae_dat.config.errors import ConfigError, DataError, MissingInputError
from mae_dat.config.flags import expand_home
from mae_dat.config.groups import ClassOrder

logger = logging.getLogger(__name__)

WORDNET_ID = re.compile(r"n\d{8}")
STORED_NAMES, GIVEN_NAMES = "names stored with the model", "names given by --classes"
BY_WORDNET_ID, BY_NUMBER = "ImageNet's WordNet ids", "folder names as numbers of the outputs"
SORTED_NAMES, INDEXED_NAMES = "folder names, sorted", "from index.safetensors"
"""Where the names of classes and their order come from."""
TEXT_SORTED = "folder names, sorted as text (--class_order text)"
_IMAGENET_HEADS = {
    1000: "imagenet-1k",
    11221: "imagenet-21k-miil",
    11821: "imagenet-12k",
    21841: "imagenet-22k",
    21842: "imagenet-22k-ms",
    21843: "imagenet-21k-goog",
}  # timm's names of the lists of classes by their lengths
_MIN_ENGLISH_NAMES = 0.8  # share of ImageNet's English names by which a stored list is recognized as ImageNet's


class OutputNames(NamedTuple):
    """The class names of a model's outputs, one each, and how they were assigned."""

    names: list[str]
    source: str


def name_outputs(
    root: str | Path,
    folders: Sequence[str],
    outputs: int,
    stored: Sequence[str] | None = None,
    indexed: Sequence[str] | None = None,
    order: ClassOrder = "auto",
) -> OutputNames:
    """Return the name of each of a model's `outputs`, so that the class folders of `root` get the right labels.

    `stored` are the names in the model's file, None if it has none; `indexed` those of the class numbers of shards, of
    which `folders` are present. `order` "text" is that of torchvision's ImageFolder, whatever the names are. Raises
    DataError where the output of a folder is unknown; names that differ only in case, accents, separators or a prefix
    are reported as such.
    """
    if order == "text":
        return _sorted_as_text(root, folders, outputs)
    synsets = imagenet_synsets(outputs)
    by_id = bool(synsets) and set(folders) <= set(synsets)
    if stored is not None and not (by_id and not set(folders) <= set(stored) and _are_english(stored, outputs)):
        check_known(root, folders, stored, "the model's classes")
        names = [*stored, *(f"unused {number}" for number in range(len(stored), outputs))]
        return OutputNames(names, STORED_NAMES)
    if by_id:
        return OutputNames(list(synsets), BY_WORDNET_ID)
    if synsets and any(re.match(r"n\d{8}(\D|$)", name) for name in folders):
        check_known(root, folders, synsets, f"ImageNet's {outputs:,} classes")
    if indexed is not None and len(indexed) == outputs:
        return OutputNames(list(indexed), INDEXED_NAMES)
    numbered = _names_by_number(folders, outputs)
    if numbered:
        return numbered
    if len(folders) == outputs:
        return OutputNames(sorted(folders), SORTED_NAMES)
    raise DataError(_explain_unknown_outputs(root, folders, outputs, bool(synsets)))


def _sorted_as_text(root: str | Path, folders: Sequence[str], outputs: int) -> OutputNames:
    """Return the names in the order of torchvision's ImageFolder: 0, 1, 10, 2. Raises DataError if it is unknown."""
    if len(folders) == outputs:
        return OutputNames(sorted(folders), TEXT_SORTED)
    every = sorted(map(str, range(outputs)))
    if set(folders) <= set(every):
        return OutputNames(every, TEXT_SORTED)
    raise DataError(
        f"{root} has {len(folders)} class folders ({_first(folders)}) and the model {outputs:,} outputs: --class_order "
        "text needs all of the folders that the model was trained on. Add them, or give the names of the outputs."
    )


def read_class_names(path: str | Path) -> list[str]:
    """Read the names of a model's classes, one a line. Raises MissingInputError, DataError for an empty line, for a
    name that is there twice, or for no name."""
    path = Path(expand_home(path))
    if not path.is_file():
        raise MissingInputError(f"--classes: no such file: {path}")
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {path}: is not a text file in UTF-8 ({error}): save it as one.") from error
    if not names or not all(name.strip() for name in names):
        raise DataError(f"--classes {path}: give one name a line, without empty lines.")
    names = [name.strip() for name in names]
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if (before := first.setdefault(name, number)) != number:
            raise DataError(f"--classes {path}: lines {before} and {number} are both {name!r}: names must differ.")
    return names


def given_class_names(path: str | Path | None, outputs: int, model: str) -> list[str] | None:
    """Read the names of a model's outputs, None without a file. Raises ConfigError for another number of names."""
    names = read_class_names(path) if path else None
    if names is not None and len(names) != outputs:
        raise ConfigError(f"--classes {path} has {len(names)} names, but {model} has {outputs} outputs.")
    return names


def _explain_unknown_outputs(root: str | Path, folders: Sequence[str], outputs: int, is_imagenet: bool) -> str:
    """Return the message for folders that cannot be assigned to outputs, with what helps."""
    kind = f"ImageNet's {outputs:,} classes, which are named by WordNet ids" if is_imagenet else "other classes"
    fixes = [f"name the folders by the numbers of their outputs (0 to {outputs - 1})"] * (len(folders) <= outputs)
    if is_imagenet:
        fixes.insert(0, "name the folders by WordNet id (n01440764 for tench)")
    return (
        f"{root} has {len(folders)} class folders ({_first(folders)}), but the model has {outputs:,} outputs and "
        f"stores no class names, so the output of each folder is unknown: it seems to be trained on {kind}. "
        f"Evaluate a model of these folders' classes{''.join(f', or {fix}' for fix in fixes)}; or give the names of "
        "the outputs with --classes FILE."
    )


def _names_by_number(folders: Sequence[str], outputs: int) -> OutputNames | None:
    """Return the names of the outputs for folders whose names are numbers, None for other names.

    Numbers below `outputs` are those of the outputs; as many other numbers as outputs are taken in numerical order.
    """
    if not folders or not all(re.fullmatch(r"[0-9]{1,9}", name) for name in folders):
        return None
    by_number = {int(name): name for name in folders}
    if len(by_number) < len(folders):
        return None
    text_order = "; torchvision's ImageFolder sorts them as text: 0, 1, 10, 2" if len(folders) > 10 else ""
    if max(by_number) < outputs:
        names = [by_number.get(number, str(number)) for number in range(outputs)]
        return OutputNames(names, BY_NUMBER + text_order)
    if len(folders) == outputs:
        return OutputNames([by_number[number] for number in sorted(by_number)], f"sorted as numbers{text_order}")
    return None


# ---- ImageNet's classes ----


@functools.cache
def imagenet_synsets(outputs: int) -> tuple[str, ...]:
    """Return the WordNet ids of a head with ImageNet's classes (1,000, or timm's versions with up to 21,843), in the
    order of the outputs; empty for another number of outputs."""
    if outputs not in _IMAGENET_HEADS:
        return ()
    from timm.data.imagenet_info import ImageNetInfo  # reads its lists for a sixth of a second

    return tuple(ImageNetInfo(_IMAGENET_HEADS[outputs]).label_names())


@functools.cache
def _wordnet_descriptions() -> dict[str, str]:
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return {name: info.label_name_to_description(name) for name in info.label_names()}


def readable_class(name: str) -> str:
    """Return a class name, a WordNet id with its first English name: `n01440764 tench`."""
    description = _wordnet_descriptions().get(name) if WORDNET_ID.fullmatch(name) else None
    return f"{name} {description.split(',')[0]}" if description else name


def _are_english(stored: Sequence[str], outputs: int) -> bool:
    """Return whether a model's names are ImageNet's English ones in its order, as transformers and torchvision have."""
    descriptions = list(_wordnet_descriptions().values())
    if len(stored) != outputs or len(descriptions) != outputs:
        return False
    hits = sum(
        bool({*map(_plain, name.split(","))} & {*map(_plain, text.split(","))})
        for name, text in zip(stored, descriptions, strict=True)
    )
    return hits >= _MIN_ENGLISH_NAMES * outputs


# ---- names that are nearly the same ----


def _plain(name: str) -> str:
    """Return a name without case, accents and separators."""
    return _without_separators(_without_accents(name.casefold()))


def _without_accents(name: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))


def _without_separators(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip()


_DIFFERENCES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("the encoding of accents (NFC and NFD)", lambda name: unicodedata.normalize("NFC", name)),
    ("case", str.casefold),
    ("accents", _without_accents),
    ("underscores, hyphens or spaces", _without_separators),
    ("case, accents and separators", _plain),
)


def describe_difference(name: str, other: str) -> str:
    """Return in what alone two different names differ, such as `case`; empty if they differ in more."""
    for difference, simplify in _DIFFERENCES:
        if simplify(name) == simplify(other):
            return difference
    short, long = sorted((_plain(name), _plain(other)), key=len)
    if short and (re.search(rf"[\W_]{re.escape(short)}$", long) or re.match(rf"{re.escape(short)}[\W_]", long)):
        return "a prefix or suffix"
    return ""


def check_known(
    root: str | Path, names: Iterable[str], known: Sequence[str], whose: str, kind: str = "class folders"
) -> None:
    """Raise DataError for names that are not among the `known` ones, saying which nearly are."""
    unknown = [name for name in names if name not in set(known)]
    if not unknown:
        return
    near = []
    for name in unknown[:100]:
        match = next(((other, text) for other in known if (text := describe_difference(name, other))), None)
        if match:
            near.append(f"{name!r} and {match[0]!r} differ only in {match[1]}")
    advice = f"{'; '.join(near[:3])}; rename the {kind}" if near else f"known are {_first(known)}"
    raise DataError(f"{root} has {kind} unknown to {whose}: {_first(unknown)}; {advice}.")


def warn_of_near_duplicates(root: str | Path, names: Sequence[str]) -> None:
    """Log a warning for two class folders whose names differ only in case, accents or separators."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_plain(name), name)
        if other != name:
            logger.warning(
                "%s: the class folders %r and %r differ only in %s; they are two classes: merge them if they are one.",
                root,
                other,
                name,
                describe_difference(name, other),
            )


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
