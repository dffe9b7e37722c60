"""Object detectors on pixels in [0, 1]: torchvision's, and Faster R-CNN on a vision transformer with a simple feature
pyramid (Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", section 3).

Pictures of a batch share one size, so torchvision's transform inside only normalises and pads with zeros to multiples
of 32 at the right and below: boxes are in pixels of what is given, and the adversary acts on that.
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torchvision
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator

from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.data.image_set import ImageSize
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import VIT_SIZES, pixel_statistics, unknown_name
from mae_dat.training.optim import vit_layer_scales

Boxes = dict[str, Tensor]
"""`boxes` (N, 4) and `labels` (N,) of one picture; of a detection also `scores` (N,)."""

FINEST_STRIDE, LEVELS = 4, 4
KEEPS_ITS_MODE = (_BatchNorm, nn.Dropout, DropPath)
# From here on boxes are computed: bfloat16 would round a coordinate of 800 to a multiple of 4.
OUTPUTS = ("rpn.head", "roi_heads.box_predictor", "head")
# Mask and keypoint R-CNN want more than boxes.
TORCHVISION = [
    name
    for name in torchvision.models.list_models(torchvision.models.detection)
    if not name.startswith(("mask", "keypoint"))
]


class Detector(nn.Module):
    """A torchvision detector that gives its losses whenever it is given the truth, else what it finds."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        for name, module in net.named_modules():
            if name in OUTPUTS:
                module.register_forward_hook(lambda module, given, made: _float32(made))

    def forward(self, image: Tensor, truth: list[Boxes] | None = None) -> Any:
        """Of pictures (B, 3, H, W) with pixels in [0, 1]: the losses by name, or for each the boxes found.

        With `truth` in evaluation mode too, where BatchNorm and drop path stay as they are in evaluation.
        """
        if truth is None:
            return self.net(list(image))
        with _giving_losses(self.net):
            return self.net(list(image), truth)

    def no_weight_decay(self) -> set[str]:
        """As timm's transformers: rules for parameters to spare."""
        return {"*.pos_embed", "*.cls_token"}

    def layer_scales(self, decay: float) -> dict[str, float]:
        """Learning rates of a vision transformer's layers, decay^(depth + 1 - layer), by parameter name; what is
        not named has 1."""
        for prefix, module in self.named_modules():
            if isinstance(module, VisionTransformer):
                names = [name for name, _ in module.named_parameters()]
                scales = vit_layer_scales(names, len(module.blocks), decay)
                return {f"{prefix}.{name}": scale for name, scale in scales.items()}
        return {}


def _float32(made: Any) -> Any:
    if isinstance(made, dict):
        return {name: _float32(one) for name, one in made.items()}
    return made.float() if isinstance(made, Tensor) else type(made)(_float32(one) for one in made)


@contextlib.contextmanager
def _giving_losses(net: nn.Module) -> Iterator[None]:
    """torchvision's detectors give losses in training mode only; flags come back afterwards."""
    flags = {module: module.training for module in net.modules()}
    for module in flags:
        module.training = module.training or not isinstance(module, KEEPS_ITS_MODE)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


class SimpleFeaturePyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from the last one of a plain transformer, and for region proposals one of 64.

    Each from the same map (B, D, h, w): by transposed convolutions that double its sides, or max pooling that halves
    them; then a 1x1 and a 3x3 convolution to `width` channels, each with a LayerNorm. For patches of 14 the strides
    are 3.5, 7, 14, 28 and 56.
    """

    def __init__(self, dim: int, width: int, patch: int) -> None:
        super().__init__()
        finest = doublings(patch)
        self.levels = nn.ModuleList(_level(dim, width, finest - number) for number in range(LEVELS))

    def forward(self, map_BDhw: Tensor) -> OrderedDict[str, Tensor]:
        """The maps by torchvision's names, "0" to "3" and "pool", finest first."""
        maps = [level(map_BDhw) for level in self.levels]
        names = [*map(str, range(LEVELS)), "pool"]
        return OrderedDict(zip(names, [*maps, nn.functional.max_pool2d(maps[-1], 1, 2)], strict=True))


def doublings(patch: int) -> int:
    """How often a map of that stride is doubled to come (nearest) to the finest stride."""
    return max(0, round(math.log2(patch / FINEST_STRIDE)))


def _level(dim: int, width: int, doubled: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2) for _ in range(-doubled)]
    for left in range(doubled, 0, -1):
        layers.append(nn.ConvTranspose2d(dim, dim // 2, 2, 2))
        dim //= 2
        if left > 1:
            layers += [ChannelNorm(dim), nn.GELU()]
    layers += [nn.Conv2d(dim, width, 1, bias=False), ChannelNorm(width)]
    layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), ChannelNorm(width)]
    return nn.Sequential(*layers)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        return super().forward(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PlainBackbone(nn.Module):
    """A vision transformer and its pyramid, as torchvision's detectors take them."""

    def __init__(self, trunk: VisionTransformer, width: int) -> None:
        super().__init__()
        self.trunk, self.out_channels = trunk, width
        self.patch = int(trunk.patch_embed.patch_size[0])
        self.pyramid = SimpleFeaturePyramid(trunk.embed_dim, width, self.patch)

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        """Maps of normalised pictures (B, 3, H, W), sides divisible by the patch."""
        tokens = self.trunk.forward_features(image)[:, self.trunk.num_prefix_tokens :]
        height, width = (side // self.patch for side in image.shape[-2:])
        return self.pyramid(tokens.transpose(1, 2).unflatten(2, (height, width)))


def divisor(name: str) -> int:
    """What the sides of a picture are padded to multiples of inside: so that every map's side is a whole number."""
    patch = VIT_SIZES[name].patch_size if name in VIT_SIZES else 8
    return patch * 2 ** (LEVELS - 1 - doublings(patch))


def padded_size(name: str, size: ImageSize) -> ImageSize:
    """The (height, width) that the network sees."""
    height, width = (math.ceil(side / divisor(name)) * divisor(name) for side in size)
    return height, width


def on_transformer(
    classifier: Classifier, name: str, classes: int, size: ImageSize, width: int, anchor: float, regions: int
) -> Detector:
    """Faster R-CNN on the network of a mean-pooling classifier `name`, built for `padded_size` and with its weights,
    without head and last norm.

    Anchors have sides of `anchor` pixels on the finest map and double from map to map; the box head learns from
    `regions` of each picture in a step.
    """
    trunk = classifier.net
    assert isinstance(trunk, VisionTransformer)
    trunk.reset_classifier(0)
    trunk.fc_norm = nn.Identity()
    mean, std = pixel_statistics(3)
    anchors = AnchorGenerator(tuple((anchor * 2.0**level,) for level in range(LEVELS + 1)), ((0.5, 1.0, 2.0),) * 5)
    net = FasterRCNN(
        PlainBackbone(trunk, width),
        num_classes=classes + 1,
        image_mean=mean,
        image_std=std,
        rpn_anchor_generator=anchors,
        box_batch_size_per_image=regions,
        rpn_pre_nms_top_n_train=min(2000, 4 * regions),
        rpn_post_nms_top_n_train=min(2000, 4 * regions),
        # As few in evaluation: of those further down the list the box head never learned that they are nothing.
        rpn_pre_nms_top_n_test=min(1000, 4 * regions),
        rpn_post_nms_top_n_test=min(1000, 4 * regions),
        min_size=min(size),
        max_size=max(size),
        size_divisible=divisor(name),
    )
    return Detector(net)


def from_torchvision(name: str, classes: int, size: ImageSize, pretrained: bool) -> Detector:
    """torchvision's detector `name`, with its ImageNet weights for the backbone if `pretrained`: its BatchNorm is then
    frozen and stays so. Raises ConfigError for another name, MissingInputError without network."""
    if name not in TORCHVISION:
        raise unknown_name("detector", name, [*VIT_SIZES, *TORCHVISION])
    # SSD has a size of its own, to which it resizes inside; its boxes come back in pixels of what is given.
    options: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": min(size), "max_size": max(size)}
    if not pretrained:
        options["weights_backbone"] = None
    try:
        net = torchvision.models.get_model(name, weights=None, num_classes=classes + 1, **options)
    except OSError as error:
        raise MissingInputError(f"weights of {name}'s backbone cannot be had: {error}. Check the network.") from error
    return Detector(net)


def check_model(name: str, finetune: str | None, pretrained: bool) -> None:
    """Raises ConfigError where weights and model do not go together."""
    if finetune and name not in VIT_SIZES:
        raise ConfigError(
            f"--finetune starts a vision transformer ({', '.join(VIT_SIZES)}), not {name}: use --pretrained for that."
        )
    if pretrained and name in VIT_SIZES:
        raise ConfigError(f"{name} has no weights of its own: give --finetune FILE, or a torchvision detector's name.")
