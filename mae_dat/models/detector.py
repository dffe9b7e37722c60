"""Object detectors on pixels in [0, 1]: torchvision's, and Faster R-CNN on a vision transformer with a simple feature
pyramid (Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", section 3).

All images of a batch have the same size, so torchvision's transform inside only normalizes, and pads with zeros on the
right and at the bottom to multiples of 32. So boxes are in pixels of the given image, which an adversary can change.
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

from mae_dat.config.errors import MissingInputError, unknown_name
from mae_dat.models.classifier import Classifier, build_classifier
from mae_dat.models.mae import VIT_SIZES, pixel_statistics
from mae_dat.models.modes import restore_training_flags

Boxes = dict[str, Tensor]
"""`boxes` (N, 4) in pixels (x1, y1, x2, y2) and `labels` (N,) of one image; of a detection also `scores` (N,)."""

FINEST_STRIDE, LEVELS = 4, 4
# torchvision's detectors return losses only in training mode, but these layers keep their mode.
_MODE_KEEPING = (_BatchNorm, nn.Dropout, DropPath)
# Boxes are computed from what these modules return: bfloat16 would round a coordinate of 800 to a multiple of 4.
_FLOAT32_OUTPUTS = ("rpn.head", "roi_heads.box_predictor", "head")
# Mask and keypoint R-CNN need more labels than boxes.
TORCHVISION_DETECTORS = [
    name
    for name in torchvision.models.list_models(torchvision.models.detection)
    if not name.startswith(("mask", "keypoint"))
]


class Detector(nn.Module):
    """A torchvision detector that returns its losses whenever it gets the true boxes, else the detections."""

    classes: tuple[str, ...] | None = None
    """The names of the labels, if known."""
    input_size: tuple[int, int] | None = None
    """Height and width of its images in pixels, if known."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        for name, module in net.named_modules():
            if name in _FLOAT32_OUTPUTS:
                module.register_forward_hook(lambda module, inputs, output: _float32(output))

    def forward(self, image: Tensor, truth: list[Boxes] | None = None) -> Any:
        """Return the losses by name (scalars) if `truth` is given, else the `Boxes` detected in each image.

        `image` (B, 3, H, W) has pixels in [0, 1]. Losses are also available in evaluation mode: BatchNorm, dropout and
        drop path then stay in evaluation mode.
        """
        if truth is None:
            return self.net(list(image))
        with _returning_losses(self.net):
            return self.net(list(image), truth)

    def no_weight_decay(self) -> set[str]:
        """Return patterns of parameter names without weight decay, as timm's transformers do."""
        return {"*.pos_embed", "*.cls_token"}

    def transformer_inside(self) -> tuple[str, VisionTransformer] | None:
        """Return the prefix of the transformer's parameter names, and the transformer; None if there is none."""
        for prefix, module in self.named_modules():
            if isinstance(module, VisionTransformer):
                return prefix, module
        return None


def _float32(output: Any) -> Any:
    if isinstance(output, dict):
        return {name: _float32(part) for name, part in output.items()}
    return output.float() if isinstance(output, Tensor) else type(output)(_float32(part) for part in output)


@contextlib.contextmanager
def _returning_losses(net: nn.Module) -> Iterator[None]:
    with restore_training_flags(net):
        for module in net.modules():
            module.training = module.training or not isinstance(module, _MODE_KEEPING)
        yield


class SimpleFeaturePyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from the last map of a plain transformer, and one of 64 for region proposals.

    Each is made from the same map (B, D, h, w): by transposed convolutions that double its sides, or max pooling that
    halves them; then a 1x1 and a 3x3 convolution to `width` channels, each with a LayerNorm. For patches of 14 pixels
    the strides are 3.5, 7, 14, 28 and 56.
    """

    def __init__(self, dim: int, width: int, patch: int) -> None:
        super().__init__()
        finest = _doublings(patch)
        self.levels = nn.ModuleList(_pyramid_level(dim, width, finest - number) for number in range(LEVELS))

    def forward(self, map_BDhw: Tensor) -> OrderedDict[str, Tensor]:
        """Return the maps (B, width, h', w') by torchvision's names, "0" to "3" and "pool", finest first."""
        maps = [level(map_BDhw) for level in self.levels]
        names = [*map(str, range(LEVELS)), "pool"]
        return OrderedDict(zip(names, [*maps, nn.functional.max_pool2d(maps[-1], 1, 2)], strict=True))


def _doublings(patch: int) -> int:
    """Return how often to double a map of stride `patch` to come closest to the finest stride."""
    return max(0, round(math.log2(patch / FINEST_STRIDE)))


def _pyramid_level(dim: int, width: int, doublings: int) -> nn.Sequential:
    """Build one level: the sides times 2^doublings (negative: halved), then convolutions to `width` channels."""
    layers: list[nn.Module] = [nn.MaxPool2d(2) for _ in range(-doublings)]
    for remaining in range(doublings, 0, -1):
        layers.append(nn.ConvTranspose2d(dim, dim // 2, 2, 2))
        dim //= 2
        if remaining > 1:
            layers += [_ChannelNorm(dim), nn.GELU()]
    layers += [nn.Conv2d(dim, width, 1, bias=False), _ChannelNorm(width)]
    layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), _ChannelNorm(width)]
    return nn.Sequential(*layers)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        return super().forward(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _PyramidBackbone(nn.Module):
    """A vision transformer and its pyramid, with the attributes that torchvision's detectors expect of a backbone."""

    def __init__(self, trunk: VisionTransformer, width: int) -> None:
        super().__init__()
        self.trunk, self.out_channels = trunk, width
        self.patch = int(trunk.patch_embed.patch_size[0])
        self.pyramid = SimpleFeaturePyramid(trunk.embed_dim, width, self.patch)

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        """Return the pyramid's maps of normalized images (B, 3, H, W), sides divisible by the patch."""
        tokens = self.trunk.forward_features(image)[:, self.trunk.num_prefix_tokens :]
        height, width = (side // self.patch for side in image.shape[-2:])
        return self.pyramid(tokens.transpose(1, 2).unflatten(2, (height, width)))


# ---- building ----


def build_detector(
    name: str,
    num_classes: int,
    size: tuple[int, int],
    *,
    width: int = 256,
    anchor_size: float = 32.0,
    regions: int = 512,
    pretrained_backbone: bool = False,
    trunk: Classifier | None = None,
) -> Detector:
    """Build a detector of images (height, width) `size`: a torchvision name, or Faster R-CNN on one of `VIT_SIZES`.

    `pretrained_backbone` is for torchvision's detectors. The others are for a transformer: `width` is the number of
    channels of the pyramid; `anchor_size` the side in pixels of the anchors on the finest map, which doubles from map
    to map; `regions` the number of regions per image that the box head learns from in a step; `trunk` a classifier from
    `build_trunk` that provides the transformer (default: a new one).

    Raises ConfigError for an unknown name, MissingInputError if the backbone's weights cannot be downloaded.
    """
    if name not in VIT_SIZES:
        return _build_torchvision_detector(name, num_classes, size, pretrained_backbone)
    trunk = trunk or build_trunk(name, size)
    return _build_vit_detector(trunk, name, num_classes, size, width=width, anchor_size=anchor_size, regions=regions)


def build_trunk(name: str, size: tuple[int, int], drop_path: float = 0.0) -> Classifier:
    """Build the mean-pooling classifier whose transformer `build_detector` uses, to load weights into it first."""
    return build_classifier(name, 1, _padded_size(name, size), drop_path)


def _size_multiple(name: str) -> int:
    """Return the number whose multiples the sides of an image are padded to, so that every map has integer sides."""
    patch = VIT_SIZES[name].patch_size
    return patch * 2 ** (LEVELS - 1 - _doublings(patch))


def _padded_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) that the transformer `name` sees."""
    multiple = _size_multiple(name)
    height, width = (math.ceil(side / multiple) * multiple for side in size)
    return height, width


def _build_vit_detector(
    classifier: Classifier,
    name: str,
    num_classes: int,
    size: tuple[int, int],
    *,
    width: int,
    anchor_size: float,
    regions: int,
) -> Detector:
    trunk = classifier.net
    assert isinstance(trunk, VisionTransformer)
    trunk.reset_classifier(0)
    trunk.fc_norm = nn.Identity()
    mean, std = pixel_statistics(3)
    anchors = AnchorGenerator(tuple((anchor_size * 2.0**level,) for level in range(LEVELS + 1)), ((0.5, 1.0, 2.0),) * 5)
    net = FasterRCNN(
        _PyramidBackbone(trunk, width),
        num_classes=num_classes + 1,
        image_mean=mean,
        image_std=std,
        rpn_anchor_generator=anchors,
        box_batch_size_per_image=regions,
        rpn_pre_nms_top_n_train=min(2000, 4 * regions),
        rpn_post_nms_top_n_train=min(2000, 4 * regions),
        # As few in evaluation: the box head has not learned that proposals further down the list are background.
        rpn_pre_nms_top_n_test=min(1000, 4 * regions),
        rpn_post_nms_top_n_test=min(1000, 4 * regions),
        min_size=min(size),
        max_size=max(size),
        size_divisible=_size_multiple(name),
    )
    return Detector(net)


def _build_torchvision_detector(name: str, num_classes: int, size: tuple[int, int], pretrained: bool) -> Detector:
    """Build torchvision's detector; with `pretrained` weights its backbone's BatchNorm is frozen and stays frozen."""
    if name not in TORCHVISION_DETECTORS:
        raise unknown_name("detector", name, [*VIT_SIZES, *TORCHVISION_DETECTORS])
    # SSD resizes images inside to its own size; its boxes are still in pixels of the given image.
    options: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": min(size), "max_size": max(size)}
    if not pretrained:
        options["weights_backbone"] = None
    try:
        net = torchvision.models.get_model(name, weights=None, num_classes=num_classes + 1, **options)
    except OSError as error:
        raise MissingInputError(
            f"weights of {name}'s backbone are not available: {error}. Check the internet connection."
        ) from error
    return Detector(net)
