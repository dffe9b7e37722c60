"""What shapes times and numerics: the hardware, and the versions of the packages that compute."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from mae_dat.runtime.environment import code_facts, told

COMMIT = "mae_dat's code"  # among the versions; equal sources compute the same, whatever their commit
PACKAGES = ("torch", "torchvision", "timm", "taming-transformers", "numpy", "scipy", "opencv-python", "pillow")


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def own_versions() -> dict[str, str]:
    """Of this package: its release with a hash of its sources, and its commit."""
    facts = code_facts()
    return {"mae_dat": f"{version('mae_dat')}, sources {facts['sha256'][:12]}", COMMIT: told(facts)}


def version(package: str) -> str:
    """An installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """The hardware, as far as it shapes times and numerics."""
    facts = {"system": f"{platform.system()} {platform.machine()}", "cores": str(os.cpu_count())}
    cpu = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.is_file()
        else []
    )
    facts["processor"] = models[0] if models else platform.processor()
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    facts["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts
