"""What a result depends on besides its configuration: versions, devices, the state of the code."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jaxunlearn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe_environment(devices: int | None = None) -> dict[str, Any]:
    """Versions, devices and, in a git checkout, the commit; no host or folder names.

    Args:
      devices: how many are used, the first ones; by default all.

    Examples:
      >>> sorted(describe_environment())
      ['backend', 'cpu_count', 'devices', 'git', 'platform', 'python', 'versions']
    """
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()[:devices]],
        "git": _git_state(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed from a wheel, or inside somebody else's checkout
        return None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(status)}
