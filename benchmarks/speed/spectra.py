"""Rows and Grams of prescribed spectrum."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def power_law(d: int, exponent: float = 1.3) -> np.ndarray:
    """``i^-exponent``, the decay of activation Grams in trained nets."""
    return np.arange(1.0, d + 1) ** -exponent


def gapped_power_law(d: int, rank: int) -> tuple[np.ndarray, float]:
    """A power law that halves after ``rank``, and the energy that exactly these directions reach.

    Without a gap, which of two nearly equal directions is kept is rounding's choice, and the
    projectors of two exact methods need not agree.
    """
    spectrum = power_law(d)
    spectrum[rank:] /= 2
    held = (spectrum[:rank].sum() - spectrum[rank - 1] / 2) / spectrum.sum()
    return spectrum, float(held)


def rows_of_spectrum(n: int, spectrum: np.ndarray, seed: int = 0) -> Float[Array, "n d"]:
    """``n`` rows whose Gram has exactly this spectrum (up to float32)."""
    rng, d = np.random.default_rng(seed), len(spectrum)
    left, _ = np.linalg.qr(rng.standard_normal((n, d), np.float32))
    right, _ = np.linalg.qr(rng.standard_normal((d, d), np.float32))
    return jnp.asarray((left * np.sqrt(spectrum, dtype=np.float32)) @ right.T)


def gram_of_spectrum(spectrum: np.ndarray, seed: int = 0) -> Float[Array, "d d"]:
    """A Gram with this spectrum."""
    d = len(spectrum)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d), np.float32))
    return jnp.asarray((Q * spectrum.astype(np.float32)) @ Q.T)
