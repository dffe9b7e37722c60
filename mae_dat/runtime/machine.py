"""What shapes times and numerics: the hardware, and the versions of the packages that compute."""

import os
import platform
from pathlib import Path

import torch


def hardware_facts() -> dict[str, str]:
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
