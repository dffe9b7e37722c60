"""The files of a stored attack: adversarial images, words and numbers, written chunk by chunk."""

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_dat.config.commands.attack import AttackFolderConfig
from mae_dat.data.adversaries import stored_name, variant_folder
from mae_dat.storage.files import atomic_write

ROW_NUMBERS = ("changed_words", "loss_clean", "loss_adversarial", "accuracy_clean", "accuracy_adversarial")
"""The numbers of each adversary: share of changed words, the teacher's losses, and whether it is right, 0 or 1."""


def part_path(output: Path, chunk: int) -> Path:
    """Return the file with the rows of a chunk, which exists once the chunk is finished."""
    return output / "parts" / f"{chunk:05d}.jsonl"


class ChunkFiles:
    """The adversaries of a chunk until they are written."""

    def __init__(self, output: Path, names: Sequence[str], config: AttackFolderConfig) -> None:
        self.output, self.names, self.config = output, names, config
        self.files: dict[tuple[int, int], bytes] = {}
        self.words: dict[int, list[np.ndarray]] = defaultdict(list)
        self.rows: dict[tuple[int, int], dict[str, Any]] = {}

    def add(self, index: int, variant: int, pixels: np.ndarray, words: np.ndarray, values: dict[str, float]) -> None:
        """Add one adversary: its pixels (H, W, 3), words (h, w) and numbers."""
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "JPEG", quality=self.config.quality, subsampling=0)
        self.files[index, variant] = content.getvalue()
        self.words[index].append(words)
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        self.rows[index, variant] = {"image": self.names[index], "index": index, "variant": variant, **size, **values}

    def write(self, chunk: int) -> None:
        """Write images, words and, last, the rows, whose file marks the chunk as finished. Raises StorageError."""
        for variant in range(self.config.variants):
            self._write_images(variant_folder(self.output, variant), chunk, variant)
        (self.output / "words").mkdir(exist_ok=True)
        words: dict[str, Any] = {str(index): np.stack(self.words[index]) for index in sorted(self.words)}
        with atomic_write(self.output / "words" / f"{chunk:05d}.npz") as file:
            np.savez(file, **words)
        lines = [json.dumps(self.rows[key]) for key in sorted(self.rows)]
        with atomic_write(part_path(self.output, chunk)) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    def _write_images(self, folder: Path, chunk: int, variant: int) -> None:
        indices = sorted(index for index, number in self.files if number == variant)
        folder.mkdir(exist_ok=True)
        if not self.config.shards:
            for index in indices:
                path = folder / stored_name(self.names[index])
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as file:
                    file.write(self.files[index, variant])
            return
        from webdataset import TarWriter

        with (
            atomic_write(folder / f"adversaries-{chunk:05d}.tar") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for index in indices:
                tar.write({"__key__": f"{index:08d}", "jpg": self.files[index, variant]})
