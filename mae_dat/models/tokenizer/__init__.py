"""Visual words: from images to indices of a codebook and back. Start with `load_tokenizer`."""

from importlib import resources
from pathlib import Path

from mae_dat.models.tokenizer.base import VisualTokenizer, share_changed
from mae_dat.models.tokenizer.light import LightConfig, LightTokenizer
from mae_dat.models.tokenizer.precision import in_precision
from mae_dat.models.tokenizer.vqgan import VQGAN, VQGAN_PRESETS, VQGANConfig
from mae_dat.storage.files import require_file
from mae_dat.storage.released import local_path
from mae_dat.storage.weight_files import read_weights, verify_card

__all__ = [
    "VQGAN",
    "VQGAN_PRESETS",
    "LightConfig",
    "LightTokenizer",
    "VQGANConfig",
    "VisualTokenizer",
    "in_precision",
    "load_tokenizer",
    "share_changed",
    "tokenizer_path",
]

EMBEDDED = "embedded"


def load_tokenizer(name_or_path: str | Path = EMBEDDED) -> VisualTokenizer:
    """Load a frozen tokenizer, in evaluation mode and on the CPU.

    If there is a card `NAME.json` with a `sha256`, the file is compared with it on every load.

    Args:
        name_or_path: `embedded` (included, for 64 px), the name of released weights such as vqgan_f8_16384, the
            `.safetensors` of a light tokenizer, or a VQGAN checkpoint of taming, latent-diffusion or easyrobust.

    Returns:
        A `VisualTokenizer`: `encode(images)` gives the words (B, h, w) of images (B, C, H, W) in [0, 1], and
        `decode(words)` images.

    Raises:
        MissingInputError: no such file or name.
        CheckpointError: the file is damaged, or is no tokenizer.
        DownloadError: released weights cannot be downloaded.

    Examples:
        >>> import mae_dat, torch
        >>> tokenizer = mae_dat.load_tokenizer()
        >>> tokenizer.encode(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 16, 16])
    """
    path = tokenizer_path(name_or_path)
    require_file(path, f"tokenizer (use --tokenizer {EMBEDDED} for the shipped one, or the path of a checkpoint)")
    verify_card(path)
    file = read_weights(path, "tokenizer")
    if file.metadata.get("tokenizer") == "light":
        return LightTokenizer.from_file(path, file).freeze()
    return VQGAN.from_state_dict(path, file.tensors).freeze()


def tokenizer_path(name_or_path: str | Path) -> Path:
    """Return the path of the weights that `load_tokenizer` reads, downloading released ones. Raises DownloadError."""
    return embedded_path() if str(name_or_path) == EMBEDDED else local_path(name_or_path)


def embedded_path() -> Path:
    """Return the path of the included weights."""
    return Path(str(resources.files("mae_dat.models.tokenizer") / "weights" / "light_f4_512.safetensors"))
