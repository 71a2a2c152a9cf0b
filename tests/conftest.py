"""A strict environment: eight virtual CPU devices, rank promotion an error, reference data."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Tests compile much and compute little: without LLVM's optimisations they take a third less time,
# without the fusion emitters, which newer versions have no flag for, again a third less.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)
# LAPACK threads that wait for busy cores cost several times what they save on small matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

from jaxunlearn.paths import reference_data

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """A program that was compiled before is read back: methods make their steps anew each time."""
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs are memory maps, of which Linux grants a process some 65,000."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for reference computations; the rest of the suite runs in float32, as users do."""
    with jax.enable_x64(True):
        yield


def _reference(subfolder):
    root = reference_data()
    if root is None or not (root / subfolder).is_dir():
        pytest.skip(f"no reference data: set JAXUNLEARN_DATA to a folder that holds {subfolder}/")
    return root / subfolder


@pytest.fixture(scope="session")
def golden():
    """Folder with inputs and outputs computed by the public reference codes."""
    return _reference("golden")


@pytest.fixture(scope="session")
def shared_data():
    """Folder with prepared data sets (tfds/) and third-party weights (weights/)."""
    return _reference("data")
