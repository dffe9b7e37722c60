"""From what a user names to folders on disk: a path, the environment's default, or `demo` for the generated
pictures."""

from pathlib import Path

from mae_dat.config import data_root
from mae_dat.generated import default_root, write_image_folder

DEMO = "demo"


def image_root(data_path: str | None) -> Path:
    """The root folder of images; `demo` draws the generated ones first, once. Raises ConfigError when nothing is
    named."""
    root = data_root(data_path)
    return write_image_folder(default_root()) if root == DEMO else Path(root)
