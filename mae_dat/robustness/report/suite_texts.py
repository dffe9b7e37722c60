"""What every suite of a report measures, in a sentence for readers who do not know it."""

from mae_dat.robustness.report.measurements import Measurement

_SUITE_TEXTS = {
    "clean": "the validation images, unchanged",
    "imagenet": "ImageNet's 50,000 validation images, unchanged",
    "imagenet-real": "ImageNet's validation images with labels that were corrected by several people",
    "imagenet-v2": "new photos, collected as ImageNet's were",
    "imagenet-a": "photos of 200 classes that a ResNet-50 gets wrong",
    "imagenet-r": "drawings, sculptures, toys and other renditions of 200 classes",
    "imagenet-sketch": "black-and-white sketches of ImageNet's classes",
    "objnet-113": "objects from unusual viewpoints and in unusual rooms, of the 113 classes that ImageNet has too",
    "objnet-1000": "objects from unusual viewpoints and in unusual rooms; predictions among all 1,000 classes",
    "stylized": "ImageNet's validation images with the texture of paintings",
    "imagenet-c": "15 corruptions (noise, blur, weather, digital) of ImageNet at 5 severities (published files)",
    "generated": "15 corruptions (noise, blur, weather, digital) at 5 severities, generated here from the clean images",
    "imagenet-c-bar": "10 more corruptions of ImageNet's images at 5 severities, unlike those of ImageNet-C",
    "cue-conflict": "images with the shape of one class and the texture of another",
    "conflict": "images with the shape of one class and the texture of another",
}
_ATTACK_TEXTS = {
    "fgsm": "clean images with the pixels changed by one gradient step against the model (FGSM)",
    "pgd": "clean images with the pixels changed by several gradient steps against the model (PGD)",
    "autoattack": "clean images with the pixels changed by four attacks, the usual test of adversarial robustness",
    "words-random": "clean images with some visual words replaced at random: a control, not an attack",
    "words-symbolic": "clean images with the visual words replaced that mislead the model most: an attack",
}
_KIND_TEXTS = {
    "corruptions": "images with corruptions at several severities",
    "shape": "images with the shape of one class and the texture of another",
    "words": "clean images with changed visual words",
    "plain": "another set of images",
}


def suite_text(measurement: Measurement) -> str:
    """Return what a suite measures, and whether its images are those of a published benchmark."""
    suite = measurement.suite
    attack = next((text for prefix, text in _ATTACK_TEXTS.items() if suite.startswith(prefix)), None)
    text = _SUITE_TEXTS.get(suite) or attack or _KIND_TEXTS.get(measurement.kind, "images of a shift")
    images = measurement.facts["images"]
    each = " each" if measurement.kind == "corruptions" else ""
    return f"{text}; {images:,} image{'' if images == 1 else 's'}{each}"


def is_attack(measurement: Measurement) -> bool:
    """Return whether a suite changes the images against the model, or is a control for such a suite."""
    return measurement.suite.startswith(tuple(_ATTACK_TEXTS))
