"""A suite as one network sees it: its measurements, and what a report says of them."""

import dataclasses
import functools
import hashlib

from mae_dat.robustness.measure import ImagePass
from mae_dat.robustness.scores.results import SuiteFacts
from mae_dat.storage.weight_files import listing


@dataclasses.dataclass(frozen=True)
class Suite:
    """Portions of pictures, measured in one way."""

    name: str
    title: str
    portions: tuple[ImagePass, ...]
    official: bool
    made: dict[str, str] = dataclasses.field(default_factory=dict)
    """What was done to the pictures: part of the protocol."""
    packages: tuple[str, ...] = ()
    """That it needs beside those of `mae_dat.runtime.environment`."""

    @property
    def preprocessing(self) -> str:
        """Networks for which it is the same look at the same pictures."""
        return self.portions[0].pictures.protocol["preprocessing"]

    @functools.cached_property
    def prints(self) -> list[str]:
        """The fingerprint of each portion's pictures."""
        return [portion.pictures.fingerprint() for portion in self.portions]

    @property
    def images(self) -> int:
        """Pictures in each cell; in the fullest, where a partial folder's cells differ."""
        return max(len(portion.pictures) for portion in self.portions)

    @property
    def missing(self) -> list[str]:
        """What any of its cells lacks, with the cells' names where not all lack it."""
        lacking: dict[str, list[str]] = {}
        for portion in self.portions:
            for told in portion.pictures.missing:
                lacking.setdefault(told, []).append(portion.cells[0])
        every = len(self.portions)
        return [told if len(cells) == every else f"{listing(cells, 5)}: {told}" for told, cells in lacking.items()]

    @property
    def facts(self) -> SuiteFacts:
        """What a report says of it."""
        joined = hashlib.sha256("".join(self.prints).encode()).hexdigest()
        return {
            "title": self.title,
            "protocol": {**self.portions[0].pictures.protocol, **self.made},
            "official": self.official,
            "images": self.images,
            "left_out": max(portion.pictures.left_out for portion in self.portions),
            "missing": self.missing,
            "fingerprint": joined if len(set(self.prints)) > 1 else self.prints[0],
        }
