"""Under which circumstances figures were measured: versions, the device, and the memory that was held."""

import platform
from importlib import metadata

import jax

__all__ = ["package_versions", "peak_memory"]


def peak_memory() -> float | None:
    """The most memory that this process ever held, in MiB, the device's not counted; unknown off Unix."""
    try:
        import resource
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1 << 20 if platform.system() == "Darwin" else 1 << 10)


def package_versions() -> dict[str, str]:
    """The versions of Python, this package and those that it computes with, and the device."""
    packages = ("tpatch-jax", "jax", "flax", "optax", "numpy", "transformers")
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **versions, "device": f"{device.platform}: {device.device_kind}"}
