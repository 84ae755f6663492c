"""The machine that a benchmark ran on."""
import platform
from pathlib import Path


def machine():
    "Processor and Python version."
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        if models: cpu = models[0]
    return dict(cpu=cpu, python=platform.python_version())
