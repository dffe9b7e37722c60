"""Published rows to hold an evaluation against, each with its source: mae_dat/robustness/report/published.yaml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


UNSURE = "§"


@dataclass(frozen=True)
class Published:
    """A row as its source prints it."""

    model: str
    px: str
    """Input size; empty where the source does not say."""
    source: str
    values: dict[str, str]
    """By key of `COLUMNS`; text, for 83.6 is not 83.60. Ends with `UNSURE` where it may be of another protocol."""
    more_data: bool
    """Whether it, or its teacher, saw more than ImageNet-1k."""
    reference: bool
    """Whether every table shows it."""

    def number(self, key: str) -> float | None:
        """The value of a column, None where there is none that is surely of the same protocol."""
        text = self.values.get(key, UNSURE)
        return None if text.endswith(UNSURE) else float(text)


def published_rows() -> list[Published]:
    """Every row of the file, in its order."""
    found = _file()
    return [
        Published(
            row["model"],
            row.get("px", ""),
            found["sources"][row["source"]],
            row["values"],
            row.get("data") == "more",
            row.get("reference") == "true",
        )
        for row in found["rows"]
    ]


def unsure_note() -> str:
    """What `UNSURE` means, for a note below a table."""
    return str(_file()["unsure"])


def _file() -> dict[str, Any]:
    text = (Path(__file__).parent / "published.yaml").read_text()
    return dict(yaml.load(text, Loader=yaml.BaseLoader))  # which leaves numbers as they are written
