"""The summary of what an evaluation reads: models, images of every suite, and what was measured before."""

import os
from collections.abc import Iterable, Sequence

from mae_dat.data.class_names import GIVEN_NAMES, STORED_NAMES
from mae_dat.data.decode import describe_decoding
from mae_dat.data.describe import describe_classes, describe_ignored, describe_root, describe_size
from mae_dat.data.loader import worker_count
from mae_dat.models.describe import HASH_DIGITS, describe_normalization, describe_tokenizer
from mae_dat.robustness.evaluation_plan import EvaluationPlan
from mae_dat.robustness.network import EvaluatedNetwork
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.choose import NOT_REQUESTED
from mae_dat.robustness.suites.sets import BenchmarkSet
from mae_dat.robustness.suites.sources import OWN_CLASSES
from mae_dat.robustness.suites.specs import suite_spec
from mae_dat.runtime.device import describe_device
from mae_dat.runtime.inputs import InputSummary, count_of

_MAX_MODELS = 4  # that the table shows; all are in the details
_MAX_LINES = 3  # of different preprocessing
_MAX_REASON = 70  # characters of a reason for which suites are skipped


def evaluation_inputs(plan: EvaluationPlan, setup: EvaluationSetup) -> InputSummary:
    """Return the summary of what an evaluation reads. Call it on rank 0. Raises DataError for unreadable images."""
    settings = plan.sources.settings
    inputs = InputSummary(setup.command)
    inputs.add("data", describe_root(settings.data_path, settings.root))
    inputs.add("suites", ", ".join(_describe_suite(plan, name) for name in plan.suite_names))
    # The stored word is part of cache keys, so that it stays as earlier versions wrote it.
    subsets = ((run.suite.name, run.suite.protocol["subset"].replace("pictures", "images")) for run in plan.runs)
    inputs.add("subset", *_by_suite(subsets))
    inputs.add("not run", *_describe_skipped(plan.skipped))
    images = plan.runs[0].suite.passes[0].images
    inputs.add("classes", _describe_class_mapping(images, plan))
    inputs.add("decoding", describe_decoding())
    ignored_files = [opened.ignored_files for opened in plan.sources.opened_sets]
    inputs.add("left out", describe_ignored(ignored_files, settings.root))
    inputs.add("partial", *_by_suite((run.suite.name, text) for run in plan.runs for text in run.suite.missing))
    add_networks(inputs, plan.networks)
    add_network_pixels(inputs, [(run.network, run.suite.preprocessing) for run in plan.runs])
    if plan.sources.has_tokenizer:
        inputs.add("tokenizer", describe_tokenizer(settings.tokenizer, plan.sources.tokenizer))
    workers = worker_count(setup.num_workers)
    inputs.add("device", describe_device(setup.options.device, setup.options.precision, workers, setup.world.size))
    inputs.add("output", _describe_output(plan, setup))
    return inputs


def _describe_suite(plan: EvaluationPlan, name: str) -> str:
    """Return a suite's name and number of images, such as `generated 75 x 1,000`."""
    suite = plan.runs_of(name)[0].suite
    cells = sum(len(image_pass.cells) for image_pass in suite.passes)
    text = f"{name} {f'{cells} x ' if cells > 1 else ''}{suite.image_count:,}"
    if suite_spec(name).kind != "derived":
        folder = os.path.relpath(suite.passes[0].images.root, plan.sources.settings.root)
        text += f" ({folder}/)" * (cells == 1 and folder != name)
    return text


def _by_suite(texts: Iterable[tuple[str, str]]) -> list[str]:
    """Return each text once, after the names of its suites; empty texts are left out."""
    names_of: dict[str, list[str]] = {}
    for name, text in texts:
        names = names_of.setdefault(text, [])
        names += [name] * (name not in names)
    return [f"{', '.join(names)}: {text}" for text, names in names_of.items() if text]


def _describe_skipped(skipped: dict[str, str]) -> list[str]:
    """Return the suites that are not measured by reason, except those that were not requested."""
    suites_of_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        if reason != NOT_REQUESTED:
            suites_of_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in suites_of_reason.items():
        shown = f"{', '.join(names[:2])} and {len(names) - 2} more" if len(names) > 3 else ", ".join(names)
        lines.append(f"{shown}: {reason if len(reason) <= _MAX_REASON else f'{reason[:_MAX_REASON]}...'}")
    return lines


def _describe_class_mapping(images: BenchmarkSet, plan: EvaluationPlan) -> str:
    """Return the classes of the first suite with their numbers, and how outputs are assigned to them."""
    mapping = images.class_mapping
    if plan.sources.settings.classes:
        source = GIVEN_NAMES
    elif any(network.classes for network in plan.networks):
        source = STORED_NAMES
    else:
        source = f"{OWN_CLASSES}, sorted by name"
    assigned = mapping.name.replace(OWN_CLASSES, source)
    return f"{describe_classes(mapping.classes)} ({assigned})"


def add_networks(inputs: InputSummary, networks: Sequence[EvaluatedNetwork]) -> None:
    """Add the models with their weights: of a single model in two rows, of several in a row for all."""
    inputs.details["models"] = {network.name: dict(network.facts) for network in networks}
    for network in networks[:_MAX_MODELS]:
        facts = network.facts
        parameters = f", {facts['parameters']:,} parameters" if facts["parameters"] else ""
        text = f"{facts['architecture']}{parameters}, {count_of(network.outputs, 'class', 'classes')}"
        if len(networks) == 1:
            inputs.add("model", text)
            inputs.add("weights", _describe_source(network))
        else:
            inputs.add("models", f"{network.name}: {text}; {_describe_source(network)}")
    if len(networks) > _MAX_MODELS:
        inputs.add("models", f"and {len(networks) - _MAX_MODELS} more")


def _describe_source(network: EvaluatedNetwork) -> str:
    """Return where the weights of a model came from."""
    if network.origin is not None:
        return network.origin.describe()
    digest, averaged = network.facts["sha256"], network.facts["averaged"]
    notes = [f"sha256 {digest[:HASH_DIGITS]}"] if digest else []
    notes += ["moving average"] if averaged else []
    return network.facts["source"] + (f" ({', '.join(notes)})" if notes else "")


def add_network_pixels(inputs: InputSummary, preprocessing: Sequence[tuple[EvaluatedNetwork, str]]) -> None:
    """Add the size, normalization and preprocessing, in words, of every model's input, each combination once."""
    combinations: dict[tuple[str, str], list[str]] = {}
    for network, text in preprocessing:
        normalization = network.facts["normalization"]
        if normalization == "inside" or hasattr(network.model, "mean"):
            normalization = describe_normalization(network.model)
        combination = f"{describe_size(network.size)}, {normalization}", text
        names = combinations.setdefault(combination, [])
        names += [network.name] * (network.name not in names)
    if len(combinations) == 1:
        inputs.add("pixels", *next(iter(combinations)))
        return
    lines = [f"{', '.join(names)}: {'; '.join(parts)}" for parts, names in combinations.items()]
    inputs.add("pixels", *lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES} more" * (len(lines) > _MAX_LINES))


def _describe_output(plan: EvaluationPlan, setup: EvaluationSetup) -> str:
    """Return the output folder, and how many measurements of an earlier call are in it."""
    if setup.folder is None:
        return "nothing is written"
    stored = total = 0
    for run in plan.runs:
        for image_pass, fingerprint in zip(run.suite.passes, run.suite.fingerprints, strict=True):
            total += 1
            stored += setup.cache.has(run.cache_key(image_pass, fingerprint))
    state = (
        f"resumes: {stored} of {count_of(total, 'measurement')} stored"
        if stored
        else f"new, {count_of(total, 'measurement')}"
    )
    return f"{setup.folder.absolute()} ({state})"
