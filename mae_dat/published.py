"""Published rows to hold an evaluation against, each with its source: mae_dat/published.yaml."""

from dataclasses import dataclass
from pathlib import Path

import yaml

COLUMNS = {
    "imagenet": "ImageNet (%) ↑",
    "imagenet-v2": "V2 (%) ↑",
    "imagenet-a": "A (%) ↑",
    "imagenet-r": "R (%) ↑",
    "imagenet-sketch": "Sketch (%) ↑",
    "objnet-113": "ObjectNet (113 classes) (%) ↑",
    "imagenet-c/mce": "ImageNet-C, mCE ↓",
    "imagenet-c-5000/mce": "ImageNet-C, 5,000 pictures, mCE ↓",
    "autoattack-4/255-5000": "AutoAttack 4/255, 5,000 pictures (%) ↑",
}


@dataclass(frozen=True)
class Published:
    """A row as its source prints it."""

    model: str
    px: str
    """Input size; empty where the source does not say."""
    source: str
    values: dict[str, str]
    """By key of `COLUMNS`; text, for 83.6 is not 83.60."""


def published_rows() -> list[Published]:
    """Every row of the file, in its order."""
    text = (Path(__file__).parent / "published.yaml").read_text()
    found = yaml.load(text, Loader=yaml.BaseLoader)  # which leaves numbers as they are written
    sources = found["sources"]
    return [Published(row["model"], row.get("px", ""), sources[row["source"]], row["values"]) for row in found["rows"]]
