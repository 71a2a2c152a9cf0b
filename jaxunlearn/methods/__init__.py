"""The methods, in one explicit table: what exists, what it needs, which scopes it supports."""

from jaxunlearn.methods import deep_unlearning as _deep_unlearning
from jaxunlearn.methods import dimensional_alignment as _dimensional_alignment
from jaxunlearn.methods import finetune as _finetune
from jaxunlearn.methods import forget_vectors as _forget_vectors
from jaxunlearn.methods import random_labels as _random_labels
from jaxunlearn.methods import unsc as _unsc
from jaxunlearn.methods.base import Method, Unlearned, UnlearningProblem
from jaxunlearn.methods.deep_unlearning import deep_unlearning
from jaxunlearn.methods.deep_unlearning_config import DeepUnlearningConfig
from jaxunlearn.methods.dimensional_alignment import dimensional_alignment
from jaxunlearn.methods.dimensional_alignment_config import DimensionalAlignmentConfig
from jaxunlearn.methods.finetune import FinetuneConfig, finetune
from jaxunlearn.methods.forget_vectors import forget_vectors, learn_forget_vectors
from jaxunlearn.methods.forget_vectors_checks import check_inputs
from jaxunlearn.methods.forget_vectors_compose import compose
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.phases import check_descends
from jaxunlearn.methods.random_labels import RandomLabelsConfig, random_labels
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
    "dimensional_alignment": Method(
        name="dimensional_alignment",
        run=dimensional_alignment,
        config=DimensionalAlignmentConfig,
        needs=_dimensional_alignment.NEEDS,
        scopes=_dimensional_alignment.SCOPES,
        summary="forget features into the span of retained ones (reconstructed, arXiv:2407.17710)",
        check=_dimensional_alignment.check_features,
    ),
    "forget_vectors": Method(
        name="forget_vectors",
        run=forget_vectors,
        config=ForgetVectorsConfig,
        needs=_forget_vectors.NEEDS,
        scopes=_forget_vectors.SCOPES,
        summary="one perturbation of all inputs; no weight changes (arXiv:2412.16780)",
        check=check_inputs,
        guards=True,
    ),
    "finetune": Method(
        name="finetune",
        run=finetune,
        config=FinetuneConfig,
        needs=_finetune.NEEDS,
        scopes=_finetune.SCOPES,
        summary="baseline: further training on the retain data",
        check=check_descends,
    ),
    "random_labels": Method(
        name="random_labels",
        run=random_labels,
        config=RandomLabelsConfig,
        needs=_random_labels.NEEDS,
        scopes=_random_labels.SCOPES,
        summary="baseline: forget data on random labels, then the retain data (arXiv:1911.04933)",
        check=check_descends,
    ),
}

__all__ = [
    "METHODS",
    "DeepUnlearningConfig",
    "DimensionalAlignmentConfig",
    "FinetuneConfig",
    "ForgetVectorsConfig",
    "Method",
    "RandomLabelsConfig",
    "UNSCConfig",
    "Unlearned",
    "UnlearningProblem",
    "compose",
    "deep_unlearning",
    "dimensional_alignment",
    "finetune",
    "forget_vectors",
    "learn_forget_vectors",
    "random_labels",
    "unsc",
]
