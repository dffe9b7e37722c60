"""The same figures and images as other programs: `python -m benchmarks.side_by_side [DIR]`.

* RobustBench (the copy that torchattacks installs): its loader of CIFAR-10-C and its `clean_accuracy`, and
  `mae_dat.evaluate`, for one model on the same files of the published layout, which hold corrupted generated images.
* imagecorruptions: its images and ours at equal seeds, of the photos in DIR or of generated ones, in gray levels.
"""

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import mae_dat
from mae_dat.data.generated.draw import draw_image
from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA, SEVERITIES, corrupt_image
from mae_dat.robustness.suites.catalogue import BENCHMARKS

IMAGES, DIFFERENT = 10_000, 500  # of a severity, and how many of them differ: the others are repeated
COMPARED = ("gaussian_noise", "fog", "pixelate", "contrast")
PHOTOS = 5


def write_cifar(root: Path) -> None:
    """Write CIFAR-10-C's files for four corruptions."""
    root.mkdir(parents=True)
    labels = np.arange(IMAGES) % 10
    np.save(root / "labels.npy", np.tile(labels, 5))
    small = clean_images()
    for name in COMPARED:
        severities = []
        for severity in SEVERITIES:
            corrupted = np.stack([corrupt_image(image, name, severity, i) for i, image in enumerate(small)])
            severities.append(np.tile(corrupted, (IMAGES // DIFFERENT, 1, 1, 1)))
        np.save(root / f"{name}.npy", np.concatenate(severities))


def clean_images() -> list[np.ndarray]:
    """Return generated images, uint8 (32, 32, 3); the class of image i is i % 10."""
    drawn = (draw_image(0, "val", i, size=64).image for i in range(DIFFERENT))
    return [np.array(Image.fromarray(image).resize((32, 32))) for image in drawn]


def nearest_mean_model() -> Any:
    """Return a model that predicts the class whose mean over the clean images is nearest, at 8 x 8 pixels."""
    pixels = torch.from_numpy(np.stack(clean_images())).permute(0, 3, 1, 2).float() / 255
    small = F.avg_pool2d(pixels, 4).flatten(1)
    means = torch.stack([small[label::10].mean(0) for label in range(10)])

    def model(images: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(F.avg_pool2d(images, 4).flatten(1), means).square()

    return model


def compare_robustbench() -> None:
    """Print the accuracies of both for every corruption and severity."""
    # Its loader of ImageNet, which is not used here, imports a package that setuptools has removed.
    sys.modules.setdefault("pkg_resources", types.ModuleType("pkg_resources"))
    from robustbench.data import load_cifar10c
    from robustbench.utils import clean_accuracy

    model = nearest_mean_model()
    with tempfile.TemporaryDirectory() as folder:
        write_cifar(Path(folder) / "CIFAR-10-C")
        few = [name for name in BENCHMARKS["cifar-10-c"].corruptions if name in COMPARED]
        evaluation = mae_dat.evaluate(
            {"m": model}, "cifar-10-c", folder, input_size=32, partial=True, precision="fp32", device="cpu"
        )
        ours = evaluation.results["cells"]["m"]["cifar-10-c"]
        print("corruption/severity  RobustBench  mae_dat (correct of 10,000)")
        for name in few:
            for severity in SEVERITIES:
                images, labels = load_cifar10c(IMAGES, severity, folder, False, [name])
                theirs = clean_accuracy(model, images, labels, batch_size=500, device=torch.device("cpu"))
                count = ours[f"{name}/{severity}"]
                equal = "equal" if round(theirs * IMAGES) == count["correct"] else "DIFFERENT"
                print(f"{name}/{severity:<6} {theirs * IMAGES:>10.0f} {count['correct']:>10} {equal}")


def compare_imagecorruptions(folder: Path | None) -> None:
    """Print, for every corruption, the mean and largest difference in gray levels over images and severities."""
    from imagecorruptions import corrupt as their_corrupt

    if folder:
        files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
        chosen = files[:: max(1, len(files) // PHOTOS)][:PHOTOS]
        images = [np.array(Image.open(path).convert("RGB").resize((224, 224))) for path in chosen]
    else:
        images = [draw_image(0, "val", i, size=224).image for i in range(PHOTOS)]
        images = [np.array(image) for image in images]
    print(f"\n{len(images)} images of 224 px, severities 1 to 5, equal seeds: difference in gray levels of 255")
    print("corruption          mean     of the image means (mean brightness)  largest value")
    for name in CORRUPTIONS + EXTRA:
        means, brightness, largest = [], [], 0
        for seed, image in enumerate(images):
            for severity in SEVERITIES:
                np.random.seed(seed)
                theirs = np.asarray(their_corrupt(image, severity, name)).astype(int)
                ours = corrupt_image(image, name, severity, seed).astype(int)
                means.append(np.abs(ours - theirs).mean())
                brightness.append(ours.mean() - theirs.mean())
                largest = max(largest, int(np.abs(ours - theirs).max()))
        print(f"{name:18} {np.mean(means):6.3f}   {np.mean(brightness):+7.3f} {largest:>34}")


def main() -> None:
    """Print both tables."""
    compare_robustbench()
    compare_imagecorruptions(Path(sys.argv[1]) if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    main()
