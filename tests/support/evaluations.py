"""Results of evaluations that never took place, for tests of their reports: counts by rule."""

from collections.abc import Sequence

from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA, SEVERITIES
from mae_dat.robustness.scores.accuracy import Count
from mae_dat.robustness.scores.corruption_error import ALEXNET
from mae_dat.robustness.scores.results import FORMAT, ModelFacts, Results, SuiteFacts

TITLES = {"plain": "MAE, fine-tuned plainly", "dat": "MAE + DAT", "random": "random words"}
PICTURES = {"imagenet": 50_000, "imagenet-v2": 10_000, "imagenet-a": 7500, "imagenet-r": 30_000, "objnet-113": 18_514}
SUITES = (*PICTURES, "imagenet-c", "generated", "cue-conflict", "pgd-5-1/255", "words-random", "words-symbolic")
NAMES = {
    "imagenet": "ImageNet",
    "imagenet-v2": "ImageNet-V2",
    "imagenet-a": "ImageNet-A",
    "imagenet-r": "ImageNet-R",
    "imagenet-c": "ImageNet-C",
    "cue-conflict": "cue conflict",
    "pgd-5-1/255": "PGD, 5 steps, Linf 1/255",
    "words-random": "random words",
    "words-symbolic": "symbolic adversary",
}
SHARES = ("0", "0.01", "0.02", "0.05", "0.1", "0.2")


def contender(name: str, size: int = 224) -> ModelFacts:
    return {
        "title": TITLES.get(name, name),
        "source": f"runs/{name}/checkpoint",
        "sha256": f"{sum(map(ord, name)):064x}",
        "architecture": "vit_base_patch16",
        "parameters": 86_567_656,
        "size": [size, size],
        "normalization": "mean 0.485 0.456 0.406, deviation 0.229 0.224 0.225",
        "interpolation": "bicubic",
        "precision": "fp32",
        "averaged": False,
    }


def suite(name: str, images: int, size: int = 224) -> SuiteFacts:
    return {
        "title": NAMES.get(name, name),
        "protocol": {
            "reading": "1000 classes",
            "preprocessing": f"resized to cover 256 x 256 (bicubic), center crop {size} x {size}",
            "folder": name,
            "subset": "",
        },
        "official": name != "generated",
        "images": images,
        "left_out": 0,
        "missing": [],
        "fingerprint": f"{sum(map(ord, name)):064x}",
    }


def cell(total: int, wrong: float, **more: int) -> Count:
    return {"correct": total - round(total * wrong), "total": total, **more}  # type: ignore[typeddict-item]


def cells(name: str, better: float) -> dict[str, Count]:
    """A suite's counts; errors are smaller by the share `better`."""
    left = 1 - better
    if name in PICTURES:
        wrong = {"imagenet": 0.164, "imagenet-v2": 0.27, "imagenet-a": 0.64, "imagenet-r": 0.52, "objnet-113": 0.58}[
            name
        ]
        return {"": cell(PICTURES[name], wrong * left, top5=PICTURES[name] - 100)}
    if name in ("imagenet-c", "generated"):
        total, names = (50_000, CORRUPTIONS + EXTRA) if name == "imagenet-c" else (1000, CORRUPTIONS)
        return {
            f"{one}/{s}": cell(total, min(1.0, (0.15 + 0.09 * s + 0.01 * i) * left * (1.1 if i % 4 == 0 else 0.9)))
            for i, one in enumerate(names)
            for s in SEVERITIES
        }
    if name == "cue-conflict":
        return {"": cell(1200, 0.6, shape=480 + round(1000 * better), texture=500)}
    if name.startswith("words"):
        drop = {"words-random": 0.6, "words-symbolic": 3.4}[name] * left
        return {share: cell(1000, 0.2 + min(0.75, drop * float(share))) for share in SHARES}
    return {"": cell(5000, 0.7 * left)}


def evaluation(names: Sequence[str] = ("plain", "dat"), suites: Sequence[str] = SUITES) -> Results:
    """Networks of these names on these suites, each a little better than the one before."""
    betters = {name: 0.06 * number for number, name in enumerate(names)}
    measured = {name: {one: cells(one, better) for one in suites} for name, better in betters.items()}
    images = {one: next(iter(cells(one, 0).values()))["total"] for one in suites}
    return {
        "format": FORMAT,
        "title": "Robustness of two fine-tunings",
        "command": "mae-dat evaluate --checkpoint runs/plain runs/dat --suite all --data DATA --output OUT",
        "created": "2025-01-02T03:04:05+00:00",
        "seconds": 4321.0,
        "machine": {"processor": "two cores"},
        "versions": {"torch": "2.15.0", "mae_dat": "0.1.0"},
        "models": {name: contender(name) for name in names},
        "suites": {name: {one: suite(one, images[one]) for one in suites} for name in names},
        "cells": measured,
        "calibration": {
            name: {
                "imagenet": {"ece": 0.043 * (1 - better), "rms": 0.06, "rms_compat": 0.058, "nll": 0.71, "brier": 0.24}
            }
            for name, better in betters.items()
            if "imagenet" in suites
        },
        "checks": {
            name: {
                "pgd-5-1/255": [
                    {"name": "gradients", "passed": True, "told": "0 of 64 pictures have no gradient"},
                    {
                        "name": "more steps help",
                        "passed": name != "random",
                        "told": "loss 5.1 after 40 steps, after 10 5.0",
                    },
                ]
            }
            for name in names
            if "pgd-5-1/255" in suites
        },
        "not_measured": {
            "imagenet-sketch": "no folder imagenet-sketch, in any spelling",
            "autoattack": "not asked for",
        },
        "examples": [],
    }


def alexnet() -> Results:
    """AlexNet's own counts on ImageNet-C and ImageNet."""
    found = evaluation(("alexnet",), ("imagenet", "imagenet-c"))
    corruptions = {f"{name}/{s}": {**count} for name, own in ALEXNET["corruptions"].items() for s, count in own.items()}
    found["cells"]["alexnet"] = {"imagenet": {"": {**ALEXNET["clean"]}}, "imagenet-c": corruptions}
    return found


PLAIN, DAT = (700, 720, 710), (741, 759, 748)  # right answers of 1,000: 41, 39 and 38 more


def trainings(**right: tuple[int, ...]) -> Results:
    """Arms with a run for each number of right answers, measured on one suite."""
    names = [f"{arm} {seed}" for arm, counts in right.items() for seed in range(len(counts))]
    given = evaluation(names, ("imagenet-a",))
    runs = zip(names, [(arm, seed) for arm, counts in right.items() for seed in range(len(counts))], strict=True)
    given["training"] = {
        "runs": {
            name: {
                "arm": arm,
                "label": {"dat": "DAT", "random": "random words"}.get(arm, arm),
                "seed": seed,
                "seconds": 90.0,
                "curves": {
                    "train_loss": [[1, 2.0], [2, None], [3, 1.5]],
                    **({} if arm == "plain" else {"changed_words": [[1, 0.01], [2, 0.0375]]}),
                },
            }
            for name, (arm, seed) in runs
        },
        "pretraining": {"train_loss": [[1, 1.0], [2, 0.5]]},
        "seconds": 60.0,
        "settings": {"fine-tuning": {"epochs": 2}},
        "galleries": [],
    }
    for name, count in zip(names, [one for counts in right.values() for one in counts], strict=True):
        given["cells"][name]["imagenet-a"][""] = cell(1000, 1 - count / 1000)
    return given
