"""The protocols of an evaluation: how the images of every suite become the input of a model.

Published figures belong to a protocol, which docs/how-to/reproduce.md lists. Importing this module does not import
torch.
"""

import dataclasses
from typing import Literal

from mae_dat.config.errors import ConfigError

ProtocolName = Literal["native", "imagenet-c", "dat", "timm"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a protocol fixes; everything else is each model's own."""

    text: str
    """The protocol in words, for the report."""
    crop: float | None = None
    """The crop's side over the resized image's."""
    interpolation: str | None = None
    crops_all_images: bool = False
    """Whether stored images of a fixed size (ImageNet-C, Stylized-ImageNet, cue conflict), and images that have the
    input's size already, are resized and cropped like all others."""
    own_crop: bool = False
    """Whether the crop is the one of timm's configuration of the model."""

    @property
    def fixes_crop(self) -> bool:
        """Whether --crop and --interpolation would contradict it."""
        return self.crops_all_images or self.crop is not None


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "native": Protocol("each model's own size, interpolation and crop; stored images of the input's size unchanged"),
    "imagenet-c": Protocol(
        "as in hendrycks/robustness: stored images unchanged, others with crop 7/8, bilinear",
        crop=0.875,
        interpolation="bilinear",
    ),
    "dat": Protocol(
        "as in DAT's released evaluation: crop 7/8, bicubic, on every set, also on stored images",
        crop=0.875,
        interpolation="bicubic",
        crops_all_images=True,
    ),
    "timm": Protocol(
        "as in timm's validate.py: each model's own size, interpolation and crop_pct, also on stored images",
        crops_all_images=True,
        own_crop=True,
    ),
}


def check_protocol(name: ProtocolName, crop: float | None, interpolation: str | None) -> None:
    """Raise ConfigError for a crop or interpolation beside a protocol that has its own."""
    for flag, value in (("--crop", crop), ("--interpolation", interpolation)):
        if value is not None and PROTOCOLS[name].fixes_crop:
            raise ConfigError(
                f"--protocol {name} has its own crop and interpolation: leave out {flag} {value}, or use --protocol "
                "native."
            )


def protocol_text(name: ProtocolName) -> str:
    """Return the name of a protocol with its meaning."""
    return f"{name}: {PROTOCOLS[name].text}"
