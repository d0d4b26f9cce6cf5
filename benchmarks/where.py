"""Where a benchmark ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import jax


def describe_machine(*packages: str) -> str:
    """A line: device, cores, versions of Python, JAX and of those packages that are there."""
    device = jax.devices()[0]
    versions = [f"Python {platform.python_version()}"]
    for name in ("jax", "jaxlib", *packages):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    where = f"{device.platform}: {device.device_kind}, {processor()}, {os.cpu_count()} cores"
    return f"{where}; {', '.join(versions)}."


def processor() -> str:
    """The processor's name, as Linux has it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
