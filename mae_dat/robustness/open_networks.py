"""Open the networks of an evaluation: from an output folder, a weights file of any format, a released name, a timm
name, an ONNX file, or, from Python, any callable."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError, suggest
from mae_dat.config.flags import expand_home
from mae_dat.config.groups import ImageSize
from mae_dat.config.protocols import PROTOCOLS
from mae_dat.models.adapters import (
    HuggingFaceClassifier,
    as_pixel_classifier,
    is_timm_model,
    is_transformers_folder,
    open_transformers_folder,
)
from mae_dat.models.classifier import Classifier, pretrained_timm
from mae_dat.models.modes import Network, evaluation_mode
from mae_dat.models.weights.formats import ModelFile
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.models.weights.read import errors_name_flag, read_model_file
from mae_dat.robustness.fingerprints import module_sha256, state_sha256
from mae_dat.robustness.network import DEFAULT_SIZE, EvalOptions, EvaluatedNetwork, create_evaluated_network
from mae_dat.robustness.onnx_network import open_onnx
from mae_dat.robustness.scores.results import ModelFacts
from mae_dat.robustness.suites.imagenet import SYNSETS
from mae_dat.runtime.inputs import count_of
from mae_dat.storage.files import sha256_of

TIMM_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:", "timm/")


def open_networks(
    sources: Sequence[str], models: Sequence[str], pretrained: bool, names: Sequence[str], options: EvalOptions
) -> list[EvaluatedNetwork]:
    """Open the networks of a command line, in its order.

    `sources` are what `open_network` takes; `models` name the architecture where a source does not (one for all, or
    one each). With `pretrained`, `models` are timm models instead, opened after the sources. `names` are the titles;
    by default those of `distinct_names`.

    Raises ConfigError, MissingInputError, CheckpointError, DownloadError.
    """
    if pretrained and not models:
        raise ConfigError("--pretrained needs --model: timm's name of a network.")
    if not pretrained and len(models) not in (0, 1, len(sources)):
        raise ConfigError(f"--model: give one name for all or one for each --checkpoint, not {len(models)}.")
    titles = _titles([*sources, *(models if pretrained else ())], names)
    architectures: list[str | None]
    if pretrained or not models:
        architectures = [None] * len(sources)
    else:
        architectures = [*models] * (len(sources) if len(models) == 1 else 1)
    opened = [
        open_network(source, architecture, title, options)
        for source, architecture, title in zip(sources, architectures, titles[: len(sources)], strict=True)
    ]
    if pretrained:
        titles_of_models = titles[len(sources) :]
        opened += [open_timm(model, title, options) for model, title in zip(models, titles_of_models, strict=True)]
    return opened


def _titles(sources: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return a distinct title for each source. Raises ConfigError."""
    if not sources:
        raise ConfigError("nothing to evaluate: give --checkpoint A [B ...], or --model NAME --pretrained.")
    if names and len(names) != len(sources):
        raise ConfigError(f"--names: {count_of(len(names), 'name')} for {count_of(len(sources), 'model')}.")
    titles = list(names) or distinct_names(sources)
    if not all(title.strip() for title in titles):
        raise ConfigError("--names: a name is blank; give each model a name.")
    if len(set(titles)) < len(titles):
        raise ConfigError(f"two models would have the same name ({', '.join(titles)}): give --names.")
    return titles


def distinct_names(sources: Sequence[str]) -> list[str]:
    """Return a short name for each source: its file's or folder's, with as many parent folders as distinguish them."""
    parts = [Path(source).with_suffix("").parts if Path(source).is_file() else Path(source).parts for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(short):
            break
    return short


def open_network(source: str, model: str | None, name: str, options: EvalOptions) -> EvaluatedNetwork:
    """Open the classifier in an output folder, a weights file, a folder of transformers, an ONNX file or a released
    name.

    `model` names the architecture if the file does not. Raises MissingInputError, CheckpointError (also for a
    pretraining and a detector), ConfigError, DownloadError.
    """
    opened = open_network_or_detector(source, model, name, options)
    return opened_network(opened, source, name, options) if isinstance(opened, OpenedModel) else opened


def open_network_or_detector(
    source: str, model: str | None, name: str, options: EvalOptions
) -> EvaluatedNetwork | OpenedModel:
    """Open what `open_network` opens, or a detector, which is returned as opened.

    Raises as `open_network` does, and ConfigError for a detector with another size than its own.
    """
    source = expand_home(source)
    if source.startswith(TIMM_PREFIXES) and not Path(source).exists():
        model = f"hf-hub:{source}" if source.startswith("timm/") else source
        raise ConfigError(f"--checkpoint {source}: timm's models are named by --model {model} --pretrained.")
    if source.endswith(".onnx"):
        return open_onnx(Path(source), name, options)
    if model is None and is_transformers_folder(Path(source)):
        return _transformers_network(open_transformers_folder(Path(source)), name, source, options)
    flag = f"--checkpoint {source}"
    with errors_name_flag(flag):
        if options.size is not None and source and read_model_file(source).kind == "detector":
            raise ConfigError(
                f"{flag} is a detector, which sees images at the size it was trained at: leave out --input_size."
            )
    opened = open_model(source, model, options.size, flag=flag)
    return opened if opened.kind == "detector" else opened_network(opened, source, name, options)


def opened_network(opened: OpenedModel, source: str, name: str, options: EvalOptions) -> EvaluatedNetwork:
    """Return the network to evaluate from the model that `source` holds. Raises CheckpointError, ConfigError."""
    with errors_name_flag(f"--checkpoint {source}"):
        classifier = opened.classifier()
    return _classifier_network(
        classifier,
        name=name,
        source=source,
        architecture=opened.plan.name,
        options=options_of_weights(opened, options),
        size=opened.input_size,
        file=opened.file,
    )


def options_of_weights(opened: OpenedModel, options: EvalOptions) -> EvalOptions:
    """Return the options with the crop and interpolation that belong to a classifier's weights, where nothing else was
    requested."""
    options = replace(
        options,
        crop=options.crop or opened.crop_pct,
        interpolation=options.interpolation or opened.interpolation,
    )
    return _with_timm_crop(opened.classifier(), options) if PROTOCOLS[options.protocol].own_crop else options


def open_timm(model: str, name: str, options: EvalOptions) -> EvaluatedNetwork:
    """Open timm's `model` with timm's own weights, and its own crop unless another one is requested."""
    network = pretrained_timm(model, options.size)
    return _classifier_network(
        network, name=name, source=f"timm {model}", architecture=model, options=_with_timm_crop(network, options)
    )


def _with_timm_crop(network: Classifier, options: EvalOptions) -> EvalOptions:
    return replace(options, crop=options.crop or resolve_model_data_config(network.net)["crop_pct"])


def _transformers_network(
    network: HuggingFaceClassifier,
    name: str,
    source: str,
    options: EvalOptions,
    classes: Sequence[str] | None = None,
) -> EvaluatedNetwork:
    """Return the network to evaluate from a classifier of transformers, with the settings of its image processor."""
    processor = network.processor
    options = replace(options, crop=options.crop or processor.crop)
    facts: ModelFacts = {
        "title": name,
        "source": source,
        "sha256": state_sha256(network),
        "architecture": type(network.net).__name__,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "size": list(options.size or processor.size),
        "normalization": f"mean {_format_numbers(network.mean)}, std {_format_numbers(network.std)}",
        "interpolation": options.interpolation or processor.interpolation,
        "precision": options.precision_name,
        "averaged": None,
    }
    opened = create_evaluated_network(network.to(options.device), facts, classes, options)
    # The names that such classifiers give ImageNet's classes are not those of its folders, so the order is trusted.
    own = network.classes if classes is None and opened.outputs != len(SYNSETS) else opened.classes
    return replace(opened, classes=own)


def _classifier_network(
    network: Classifier,
    *,
    name: str,
    source: str,
    architecture: str,
    options: EvalOptions,
    size: ImageSize | None = None,
    classes: Sequence[str] | None = None,
    file: ModelFile | None = None,
) -> EvaluatedNetwork:
    """Return the network to evaluate from a classifier of ours.

    `file` is what its weights were read from; it may record the names of the classes, and whether the weights are a
    moving average.
    """
    timm_settings = resolve_model_data_config(network.net)
    if PROTOCOLS[options.protocol].own_crop:
        options = _with_timm_crop(network, options)
    path = Path(file.source) if file else None
    averaged = None
    if file is not None:
        averaged = any(wrapper.startswith("the average") for wrapper in file.wrappers) or file.facts.get("averaged")
        classes = file.facts.get("classes")
    facts: ModelFacts = {
        "title": name,
        "source": source,
        "sha256": sha256_of(path) if path and path.is_file() else state_sha256(network),
        "architecture": architecture,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "size": list(options.size or size or timm_settings["input_size"][-2:]),
        "normalization": f"mean {_format_numbers(network.mean)}, std {_format_numbers(network.std)}",
        "interpolation": options.interpolation or network.interpolation or timm_settings["interpolation"],
        "precision": options.precision_name,
        "averaged": averaged,
    }
    network = network.to(options.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    opened = create_evaluated_network(network.eval(), facts, classes, options)
    if file is None:
        return opened
    is_known = bool(file.facts or file.statistics)
    return replace(opened, origin=replace(file.origin, sha256=facts["sha256"] or ""), normalization_is_known=is_known)


def _format_numbers(values: Tensor) -> str:
    return " ".join(f"{value:.6g}" for value in values.flatten().tolist())


def open_callable(
    network: Network, name: str, options: EvalOptions, classes: Sequence[str] | None = None
) -> EvaluatedNetwork:
    """Return the network to evaluate from a callable of pixels in [0, 1], or a model of timm or transformers.

    A module is moved to the device. `classes` are by default those that the module records. Raises ConfigError if it
    fails on a blank image, or declares that it takes normalized ones.
    """
    is_timm = is_timm_model(network)
    network = as_pixel_classifier(network)
    module = network if isinstance(network, nn.Module) else None
    with evaluation_mode(network):
        sha256 = module_sha256(module) if module else None
    identity = {"code": sha256} if sha256 else None
    if isinstance(network, HuggingFaceClassifier):
        opened = _transformers_network(network, name, "Python", options, classes)
        return replace(opened, identity=identity)
    if isinstance(network, Classifier):
        with evaluation_mode(network):
            opened = _classifier_network(
                network,
                name=name,
                source="Python",
                architecture=type(network.net).__name__,
                options=_with_timm_crop(network, options)
                if is_timm
                else replace(options, crop=options.crop or network.crop_pct),
                size=network.input_size,
                classes=classes or network.classes,
            )
        return replace(opened, identity=identity)
    facts: ModelFacts = {
        "title": name,
        "source": "callable",
        "sha256": state_sha256(module) if module and module.state_dict() else None,
        "architecture": type(network).__name__ if module else getattr(network, "__name__", type(network).__name__),
        "parameters": sum(parameter.numel() for parameter in module.parameters()) if module else 0,
        "size": list(options.size or DEFAULT_SIZE),
        "normalization": "inside",
        "interpolation": options.interpolation or "bicubic",
        "precision": options.precision_name,
        "averaged": None,
    }
    opened = create_evaluated_network(module.to(options.device) if module else network, facts, classes, options)
    return replace(opened, identity=identity)


def baseline_first(networks: Sequence[EvaluatedNetwork], baseline: str | None) -> list[EvaluatedNetwork]:
    """Return the networks, the baseline before the others. Raises ConfigError for an unknown name."""
    names = [network.name for network in networks]
    if baseline is not None and baseline not in names:
        raise ConfigError(f"--baseline {baseline}: {suggest(baseline, names)}")
    return sorted(networks, key=lambda network: network.name != (baseline or names[0]))
