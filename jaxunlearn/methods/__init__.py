"""The methods, in one explicit table: what exists, what it needs, which scopes it supports."""

from jaxunlearn.methods import deep_unlearning as _deep_unlearning
from jaxunlearn.methods import unsc as _unsc
from jaxunlearn.methods.base import Method, Unlearned, UnlearningProblem
from jaxunlearn.methods.deep_unlearning import deep_unlearning
from jaxunlearn.methods.deep_unlearning_config import DeepUnlearningConfig
from jaxunlearn.methods.unsc import unsc
from jaxunlearn.methods.unsc_config import UNSCConfig

METHODS: dict[str, Method] = {
    "unsc": Method(
        name="unsc",
        run=unsc,
        config=UNSCConfig,
        needs=_unsc.NEEDS,
        scopes=_unsc.SCOPES,
        summary="pseudo labels, updates in the null space of the retain data (arXiv:2404.13588)",
        check=_unsc.layers_to_project,
    ),
    "deep_unlearning": Method(
        name="deep_unlearning",
        run=deep_unlearning,
        config=DeepUnlearningConfig,
        needs=_deep_unlearning.NEEDS,
        scopes=_deep_unlearning.SCOPES,
        summary="closed-form edit of the kernels, without gradients (arXiv:2312.00761)",
        check=_deep_unlearning.layers_to_edit,
    ),
}

__all__ = [
    "METHODS",
    "DeepUnlearningConfig",
    "Method",
    "UNSCConfig",
    "Unlearned",
    "UnlearningProblem",
    "deep_unlearning",
    "unsc",
]
