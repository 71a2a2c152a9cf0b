"""The membership SVC in thirteen numbers against libsvm: 5 times at 9,000 images a side.

Confidences of the four laws that the tests use, fitted and scored on 5,000 forget images.
Agreement: at most one answer in 1,000 differs, as libsvm stops at its default tolerance.
"""

import numpy as np
from sklearn.svm import SVC

from benchmarks.timing import Way, compare, main
from jaxunlearn.evaluation.confidence_svc import fit_confidence_svc

N, FORGET = 9000, 5000
PAIRS = {
    "overlapping, members confident": ((20, 0.3), (6, 0.6)),
    "overlapping": ((8, 1), (6, 1.2)),
    "nearly alike": ((0.3, 3), (0.3, 2.5)),
    "separable": ((40, 1), (1, 20)),
}


def measure() -> list[dict]:
    """One row per law; separable sets are easy for libsvm too and have no bar."""
    return [_row(name, None if name == "separable" else 5) for name in PAIRS]


def _row(name: str, bar: float | None) -> dict:
    rng = np.random.default_rng(0)
    members, non_members = (rng.beta(a, b, N) for a, b in PAIRS[name])
    both = np.concatenate([members, non_members])
    scored = np.concatenate([both, rng.beta(*PAIRS[name][0], FORGET)])
    truth = np.repeat([1, 0], N)

    def features() -> np.ndarray:
        return fit_confidence_svc(members, non_members).decision(scored) > 0

    def libsvm() -> np.ndarray:
        return SVC(C=3, gamma=1.0).fit(both[:, None], truth).predict(scored[:, None]) == 1

    differing = float(np.mean(features() != libsvm()))
    assert differing <= 1e-3, differing
    ways = {"features": Way(features), "libsvm": Way(libsvm, repeats=1)}
    return compare(name, ways, fast="features", naive="libsvm", bar=bar, differing=differing)


if __name__ == "__main__":
    main("confidence_svc", __doc__, measure)
