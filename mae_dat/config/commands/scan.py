"""Flags of `mae-dat scan`."""

import dataclasses

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.groups import default_num_workers


@dataclasses.dataclass(frozen=True)
class ScanConfig(CommandConfig):
    """Decode every image of a folder, list the unreadable ones, and write a manifest that reveals later changes.

    Writes DIR/manifest.jsonl with the size, sha256, width and height of each image. With --verify, compares the files
    with the manifest, because an image may still decode after a bit has flipped. Shards are compared with their index
    in both cases. The exit code is 65 if anything is wrong.
    """

    verb = "scan"
    folder: str = dataclasses.field(metadata={"positional": "DIR"})
    """Folder of images, or of shards."""
    verify: bool = False
    """Compare the files with the manifest of an earlier scan, and decode nothing."""
    manifest: str | None = None
    """The manifest (default: DIR/manifest.jsonl)."""
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images; 0 decodes in the main process (default: the CPU cores, at most 10)."""
