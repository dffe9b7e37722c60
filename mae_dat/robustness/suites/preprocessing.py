"""How a benchmark's image becomes the input of a network: resized and cropped as the protocol says."""

import dataclasses

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from mae_dat.config.groups import ImageSize
from mae_dat.config.protocols import PROTOCOLS, ProtocolName
from mae_dat.data.transforms import EvalTransform


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Converts a decoded image to the network's input; its text is part of a result's key."""

    size_HW: ImageSize
    interpolation: str = "bicubic"
    side: int | None = None
    """Height and width of stored images, which are cropped only where the protocol says so."""
    border: int = 0
    """Pixels cut off on each side first."""
    crop: float | None = None
    """The crop's side over the resized image's, if the network has its own; not used for stored images unless the
    protocol crops them."""
    keep_size: bool = False
    """Whether an image of exactly the network's size stays unchanged; never in the benchmarks."""
    protocol: ProtocolName = "native"
    whole: bool = False
    """Whether the whole image is resized to the input, without a crop."""

    @property
    def crops_all_images(self) -> bool:
        """Whether stored images, and images of the network's size, are resized and cropped like all others."""
        return PROTOCOLS[self.protocol].crops_all_images

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float pixels (3, H, W) in [0, 1]."""
        return functional.to_tensor(self.resize_and_crop(image))

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Return the 8-bit RGB image that becomes the input."""
        width, height = image.size
        if self.border:
            image = image.crop((self.border, self.border, width - self.border, height - self.border))
        if self.whole and not self.crops_all_images:
            interpolation = transforms.InterpolationMode(self.interpolation)
            return functional.resize(image, list(self.size_HW), interpolation)
        is_stored = self.side is not None and not self.crops_all_images
        crop_pct = 1.0 if is_stored else self.crop
        keep_size = is_stored or (self.keep_size and not self.crops_all_images)
        return EvalTransform(self.size_HW, self.interpolation, crop_pct, keep_size).resize_and_crop(image)

    def __str__(self) -> str:
        size, side = f"{self.size_HW[0]} x {self.size_HW[1]}", self.side
        named = f"protocol {self.protocol}: " if self.protocol != "native" else ""
        if self.whole and not self.crops_all_images:
            return f"{named}the whole image resized to {size} ({self.interpolation})"
        if side is None or self.crops_all_images:
            height, width = EvalTransform(self.size_HW, crop_pct=self.crop).cover_HW
            prefix = f"{named}border of {self.border} px cut, " if self.border else named
            prefix += f"if not {size}: " if self.keep_size and not self.crops_all_images else ""
            suffix = f", the network's own share of {self.crop:g}" if self.crop else ""
            return f"{prefix}resized to cover {height} x {width} ({self.interpolation}), center crop {size}{suffix}"
        as_stored = f"{named}{side} x {side} as stored"
        return as_stored if self.size_HW == (side, side) else f"{as_stored}, resized to {size} ({self.interpolation})"
