"""What a benchmark's numbers depend on."""
import platform
from pathlib import Path


def machine():
    "Processor and Python; no names of folders."
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((l.split(":")[1].strip() for l in lines if l.startswith("model name")), cpu)
    return dict(cpu=cpu, python=platform.python_version())
