"""Hardware facts of this machine, for reports and benchmarks."""

import os
import platform
from pathlib import Path

import torch


def hardware_facts() -> dict[str, str]:
    """Return the hardware facts that determine times and rounding: processor, instruction set, threads and GPU."""
    facts = {"system": f"{platform.system()} {platform.machine()}", "cores": str(os.cpu_count())}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    facts["processor"] = models[0] if models else platform.processor()
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    facts["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts
