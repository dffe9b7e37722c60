"""Flags of `mae-dat scan`."""

import dataclasses
from typing import Annotated

import tyro

from mae_dat.config.groups import default_num_workers


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """Decode every image of a folder once, list the unreadable ones, and write a manifest that reveals later changes.

    Writes DIR/manifest.jsonl with the size, sha256, width and height of each image. With --verify, compares the files
    with it: most flipped bits leave an image that decodes, with other pixels. Shards are compared with their index in
    both cases. The exit code is 65 if anything is wrong.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = tyro.MISSING
    """Folder of images, or of shards."""
    verify: bool = False
    """Compare with the manifest of an earlier scan, and decode nothing."""
    manifest: str | None = None
    """File of the manifest (default: manifest.jsonl in the folder)."""
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images (default: the CPU cores of this process, at most 10; 0: the main process)."""
