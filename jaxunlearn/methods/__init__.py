"""The methods, in one explicit table: what exists, what it needs, which scopes it supports."""

from jaxunlearn.methods import unsc as _unsc
from jaxunlearn.methods.base import Method, Unlearned, UnlearningProblem
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
    ),
}

__all__ = ["METHODS", "Method", "UNSCConfig", "Unlearned", "UnlearningProblem", "unsc"]
