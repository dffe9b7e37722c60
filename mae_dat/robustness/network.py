"""The networks of an evaluation, from wherever they come, and the facts that are part of their results' key.

An output folder, a weights file of any format, a released or a timm name, an ONNX file, or from Python any callable:
all of them map float pixels (B, 3, H, W) in [0, 1] to logits (B, K), the normalization inside.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from mae_dat.attacks.checks import require_no_declared_normalization
from mae_dat.config.errors import CheckpointError, MissingInputError, NumericsError
from mae_dat.config.groups import ConfigError, image_size
from mae_dat.data.image_set import ImageSize
from mae_dat.data.transforms import default_crop_pct
from mae_dat.models.classifier import Classifier, pretrained_timm
from mae_dat.models.modes import eval_mode
from mae_dat.models.weights.open import naming, open_source, read_export
from mae_dat.robustness.identity import module_sha256, onnx_sha256, state_sha256
from mae_dat.robustness.scores.results import Contender as Facts
from mae_dat.storage.files import sha256_of
from mae_dat.storage.released import local_path
from mae_dat.storage.weight_files import WeightsFile

Network = Callable[[Tensor], Tensor]
USUAL_SIZE = (224, 224)
TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:", "timm/")


@dataclass(frozen=True)
class View:
    """How the pictures of an evaluation are wanted, where it is not as the networks themselves say."""

    device: torch.device
    precision: torch.dtype | None = None
    """Of autocast; None for float32."""
    size: ImageSize | None = None
    interpolation: str | None = None
    crop: float | None = None
    """The crop's side over the resized picture's, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ConfigError(f"--crop {self.crop}: give a share of the side above 0 and at most 1.")

    def cropped(self, facts: Facts) -> Facts:
        """The facts with the crop, where it is not the usual one."""
        height, width = facts["size"]
        usual = self.crop is None or abs(self.crop - default_crop_pct((height, width))) < 1e-3
        return facts if usual or self.crop is None else {**facts, "crop": self.crop}


@dataclass(frozen=True)
class Contender:
    """A network that is evaluated, on its device."""

    name: str
    network: Network
    facts: Facts
    outputs: int
    classes: tuple[str, ...] | None
    """The names of its classes, None where nothing says."""
    differentiable: bool
    device: torch.device
    identity: dict[str, str] | None = field(default_factory=dict)
    """What its results are stored under beside its facts; None where it cannot be told from another network."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that it needs beside those of `mae_dat.runtime.environment`."""

    @property
    def size(self) -> ImageSize:
        """Height and width of its input."""
        height, width = self.facts["size"]
        return height, width

    @property
    def key(self) -> dict[str, Any] | None:
        """What its results are stored under; None where they are not."""
        own = {key: value for key, value in self.facts.items() if key not in ("title", "source")}
        return None if self.identity is None else own | self.identity


# ---- opening ----


def open_contenders(
    sources: Sequence[str], models: Sequence[str], pretrained: bool, names: Sequence[str], view: View
) -> list[Contender]:
    """What a command line names: `sources` with `models` for what they do not say of themselves (one for all, or one
    each), or, if `pretrained`, the timm models of that name beside them.

    Raises ConfigError, MissingInputError, CheckpointError, DownloadError.
    """
    if pretrained and not models:
        raise ConfigError("--pretrained needs --model: timm's name of a network.")
    if not pretrained and len(models) not in (0, 1, len(sources)):
        raise ConfigError(f"--model: give one name for all or one for each --checkpoint, not {len(models)}.")
    given = [*sources, *(models if pretrained else ())]
    if not given:
        raise ConfigError("nothing to evaluate: give --checkpoint A [B ...], or --model NAME --pretrained.")
    if names and len(names) != len(given):
        raise ConfigError(f"--names: {len(names)} names for {len(given)} networks.")
    titles = list(names) or distinct_names(given)
    if not all(title.strip() for title in titles):
        raise ConfigError("--names: a network needs a name that can be seen.")
    if len(set(titles)) < len(titles):
        raise ConfigError(f"two networks would have the same name ({', '.join(titles)}): give --names.")
    own = [None] * len(sources) if pretrained or not models else [*models] * (len(sources) if len(models) == 1 else 1)
    opened = [open_contender(source, model, title, view) for source, model, title in zip(sources, own, titles)]  # noqa: B905
    if pretrained:
        opened += [_from_timm(model, title, view) for model, title in zip(models, titles[len(sources) :], strict=True)]
    return opened


def distinct_names(sources: Sequence[str]) -> list[str]:
    """A short name for each: its file's or folder's, with as many of the folders above as tell them apart."""
    parts = [Path(source).with_suffix("").parts if Path(source).is_file() else Path(source).parts for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(short):
            break
    return short


def open_contender(source: str, model: str | None, name: str, view: View) -> Contender:
    """The classifier of an output folder, a weights or ONNX file, or a released name.

    Raises MissingInputError, CheckpointError (also for a pretraining), ConfigError, DownloadError.
    """
    if source.startswith(TIMM_SOURCES) and not Path(source).exists():
        model = f"hf-hub:{source}" if source.startswith("timm/") else source
        raise ConfigError(f"--checkpoint {source}: networks of timm are named by --model {model} --pretrained.")
    if source.endswith(".onnx"):
        return _from_onnx(Path(source), name, view)
    weights, facts = read_export(Path(source))
    told = weights._replace(metadata={"mae_dat": json.dumps(facts)}) if facts else weights
    with naming(f"--checkpoint {source}"):
        opened = open_source(told, model, view.size)
    if not isinstance(opened.network, Classifier):
        raise CheckpointError(f"--checkpoint {source} is a pretraining, which has no classes yet: fine-tune it first.")
    plan = opened.plan
    return _classifier(opened.network, name, source, plan.name, view, plan.img_size, facts, weights)


def _from_timm(model: str, name: str, view: View) -> Contender:
    network = pretrained_timm(model, view.size)
    crop = view.crop or resolve_model_data_config(network.net)["crop_pct"]
    return _classifier(network, name, f"timm {model}", model, replace(view, crop=crop))


def _classifier(
    network: Classifier,
    name: str,
    source: str,
    architecture: str,
    view: View,
    size: ImageSize | None = None,
    told: Mapping[str, Any] | None = None,
    weights: WeightsFile | None = None,
) -> Contender:
    """`told` is what the source says of itself: its classes, and whether its weights are a moving average."""
    told = told or {}
    settings = resolve_model_data_config(network.net)
    path = Path(weights.source) if weights else None
    wrapped = any(one.startswith("the average") for one in weights.wrappers) if weights else False
    facts: Facts = {
        "title": name,
        "source": source,
        "sha256": sha256_of(path) if path and path.is_file() else state_sha256(network),
        "architecture": architecture,
        "parameters": sum(one.numel() for one in network.parameters()),
        "size": list(view.size or size or settings["input_size"][-2:]),
        "normalization": f"mean {_numbers(network.mean)}, std {_numbers(network.std)}",
        "interpolation": view.interpolation or settings["interpolation"],
        "precision": _precision(view),
        "averaged": wrapped or told.get("averaged"),
    }
    network = network.to(view.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _probed(network.eval(), facts, told.get("classes"), view)


def from_callable(network: Network, name: str, view: View, classes: Sequence[str] | None = None) -> Contender:
    """Any callable of pixels in [0, 1]; a module is moved to the device. Raises ConfigError where it fails on a blank
    picture, or says that it takes normalised ones."""
    module = network if isinstance(network, nn.Module) else None
    with eval_mode({name: network}):
        known = module_sha256(module) if module else None
    identity = {"code": known} if known else None
    if isinstance(network, Classifier):
        opened = _classifier(network, name, "Python", type(network.net).__name__, view, told={"classes": classes})
        return replace(opened, identity=identity)
    facts: Facts = {
        "title": name,
        "source": "callable",
        "sha256": state_sha256(module) if module and module.state_dict() else None,
        "architecture": type(network).__name__ if module else getattr(network, "__name__", type(network).__name__),
        "parameters": sum(one.numel() for one in module.parameters()) if module else 0,
        "size": list(view.size or USUAL_SIZE),
        "normalization": "inside",
        "interpolation": view.interpolation or "bicubic",
        "precision": _precision(view),
        "averaged": None,
    }
    return replace(_probed(module.to(view.device) if module else network, facts, classes, view), identity=identity)


def _from_onnx(path: Path, name: str, view: View) -> Contender:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingInputError(f'{path} needs the package {error.name}: pip install "mae_dat[export]"') from error
    path = local_path(path)
    if not path.is_file():
        raise MissingInputError(f"--checkpoint: no such file: {path}")
    try:
        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        loaded = onnx.load(path, load_external_data=False)
    except Exception as error:  # of onnxruntime's own kinds, one a fault
        raise CheckpointError(f"{path} cannot be run as ONNX: {str(error).splitlines()[0]}") from error
    (given, *others) = session.get_inputs()
    sides = [side for side in given.shape[-2:] if isinstance(side, int)]
    if others or len(given.shape) != 4 or given.type != "tensor(float)":
        raise CheckpointError(f"{path} must take one input, float (B, 3, H, W) in [0, 1], not {given.shape}.")

    batch = given.shape[0] if isinstance(given.shape[0], int) else None

    def network(image: Tensor) -> Tensor:
        parts = image.detach().float().split(batch or len(image))
        found = [session.run(None, {given.name: _filled(part, batch).cpu().numpy()})[0][: len(part)] for part in parts]
        return torch.from_numpy(np.concatenate(found)).to(image.device)

    facts: Facts = {
        "title": name,
        "source": str(path),
        "sha256": onnx_sha256(path, loaded),
        "architecture": "ONNX graph",
        "parameters": sum(int(torch.tensor(list(one.dims)).prod()) for one in loaded.graph.initializer),
        "size": list(view.size or (sides if len(sides) == 2 else USUAL_SIZE)),
        "normalization": "inside",
        "interpolation": view.interpolation or "bicubic",
        "precision": "fp32",
        "averaged": None,
    }
    return replace(_probed(network, facts, None, view), versions={"onnxruntime": onnxruntime.__version__})


def _filled(image: Tensor, batch: int | None) -> Tensor:
    """Pictures (B, C, H, W) with black ones behind them up to a graph's fixed batch."""
    return image if batch is None else F.pad(image, (0, 0, 0, 0, 0, 0, 0, batch - len(image)))


# ---- facts ----


def _probed(network: Network, facts: Facts, classes: Sequence[str] | None, view: View) -> Contender:
    """The contender, after two blank pictures have gone through it."""
    name, size = facts["title"], image_size(tuple(facts["size"]))
    require_no_declared_normalization(network)
    blank = torch.zeros(2, 3, *size, device=view.device)
    refused = f"{name} does not take pictures of {len(blank)} x 3 x {size[0]} x {size[1]}"
    try:
        with torch.enable_grad():
            logits = network(blank.requires_grad_())
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{refused}: {error}") from error
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        told = " ".join(str(error).split())
        raise ConfigError(
            f"{refused}: {told}. A graph that takes one picture alone is to be exported again with a dynamic batch "
            "axis (torch.onnx.export: dynamic_axes or dynamic_shapes)."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(blank):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"{name} gives {found} for {len(blank)} pictures, not logits of shape (2, classes).")
    if not logits.isfinite().all():
        raise NumericsError(
            f"{name} gives NaN or infinite logits for a blank picture: its weights are damaged; check the checkpoint."
        )
    if classes is not None and len(classes) != logits.shape[1]:
        raise ConfigError(f"{name} has {logits.shape[1]} outputs and a list of {len(classes)} classes.")
    known = tuple(classes) if classes else None
    return Contender(name, network, view.cropped(facts), logits.shape[1], known, logits.requires_grad, view.device)


def _numbers(values: Tensor) -> str:
    return " ".join(f"{value:.6g}" for value in values.flatten().tolist())


def _precision(view: View) -> str:
    return "fp32" if view.precision is None else "bf16"
