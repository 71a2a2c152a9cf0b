"""The methods, in one explicit table: what exists, what it needs, which scopes it supports."""

from jaxunlearn.methods import bad_teacher as _bad_teacher
from jaxunlearn.methods import boundary_expanding as _boundary_expanding
from jaxunlearn.methods import boundary_shrink as _boundary_shrink
from jaxunlearn.methods import dampening as _dampening
from jaxunlearn.methods import deep_unlearning as _deep_unlearning
from jaxunlearn.methods import dimensional_alignment as _dimensional_alignment
from jaxunlearn.methods import finetune as _finetune
from jaxunlearn.methods import fisher_noise as _fisher_noise
from jaxunlearn.methods import forget_vectors as _forget_vectors
from jaxunlearn.methods import gradient_ascent as _gradient_ascent
from jaxunlearn.methods import head_edit as _head_edit
from jaxunlearn.methods import identity as _identity
from jaxunlearn.methods import influence as _influence
from jaxunlearn.methods import kernel_transpose as _kernel_transpose
from jaxunlearn.methods import masked_small_gradients as _masked_small_gradients
from jaxunlearn.methods import negative_gradient_plus as _negative_gradient_plus
from jaxunlearn.methods import random_labels as _random_labels
from jaxunlearn.methods import retrain as _retrain
from jaxunlearn.methods import saliency as _saliency
from jaxunlearn.methods import scar as _scar
from jaxunlearn.methods import scrub as _scrub
from jaxunlearn.methods import unsc as _unsc
from jaxunlearn.methods import unsir as _unsir
from jaxunlearn.methods.bad_teacher import BadTeacherConfig, bad_teacher
from jaxunlearn.methods.base import Method, Unlearned, UnlearningProblem
from jaxunlearn.methods.boundary_expanding import BoundaryExpandingConfig, boundary_expanding
from jaxunlearn.methods.boundary_shrink import BoundaryShrinkConfig, boundary_shrink
from jaxunlearn.methods.dampening import DampeningConfig, dampening
from jaxunlearn.methods.deep_unlearning import deep_unlearning
from jaxunlearn.methods.deep_unlearning_config import DeepUnlearningConfig
from jaxunlearn.methods.dimensional_alignment import dimensional_alignment
from jaxunlearn.methods.dimensional_alignment_config import DimensionalAlignmentConfig
from jaxunlearn.methods.finetune import FinetuneConfig, finetune
from jaxunlearn.methods.fisher_noise import FisherNoiseConfig, fisher_noise
from jaxunlearn.methods.forget_vectors import forget_vectors, learn_forget_vectors
from jaxunlearn.methods.forget_vectors_checks import check_inputs
from jaxunlearn.methods.forget_vectors_compose import compose
from jaxunlearn.methods.forget_vectors_config import ForgetVectorsConfig
from jaxunlearn.methods.gradient_ascent import GradientAscentConfig, gradient_ascent
from jaxunlearn.methods.head_edit import HeadEditConfig, head_edit
from jaxunlearn.methods.identity import IdentityConfig, identity
from jaxunlearn.methods.influence import InfluenceConfig, influence
from jaxunlearn.methods.kernel_transpose import KernelTransposeConfig, kernel_transpose
from jaxunlearn.methods.masked_small_gradients import (
    MaskedSmallGradientsConfig,
    masked_small_gradients,
)
from jaxunlearn.methods.negative_gradient_plus import (
    NegativeGradientPlusConfig,
    negative_gradient_plus,
)
from jaxunlearn.methods.phases import check_descends
from jaxunlearn.methods.random_labels import RandomLabelsConfig, random_labels
from jaxunlearn.methods.retrain import RetrainConfig, retrain
from jaxunlearn.methods.saliency import SaliencyConfig, saliency
from jaxunlearn.methods.scar import scar
from jaxunlearn.methods.scar_config import ScarConfig
from jaxunlearn.methods.scrub import ScrubConfig, scrub
from jaxunlearn.methods.unsc import unsc
from jaxunlearn.methods.unsc_config import UNSCConfig
from jaxunlearn.methods.unsir import UnsirConfig, unsir

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
    "identity": Method(
        name="identity",
        run=identity,
        config=IdentityConfig,
        needs=_identity.NEEDS,
        scopes=_identity.SCOPES,
        summary="control: the original, unchanged",
    ),
    "head_edit": Method(
        name="head_edit",
        run=head_edit,
        config=HeadEditConfig,
        needs=_head_edit.NEEDS,
        scopes=_head_edit.SCOPES,
        summary="control: forgotten classes silenced in the bias of the head",
        check=_head_edit.check_head,
    ),
    "retrain": Method(
        name="retrain",
        run=retrain,
        config=RetrainConfig,
        needs=_retrain.NEEDS,
        scopes=_retrain.SCOPES,
        summary="reference: a new training without the forget data, of all or of the last layers",
        check=_retrain.check_retrain,
    ),
    "finetune": Method(
        name="finetune",
        run=finetune,
        config=FinetuneConfig,
        needs=_finetune.NEEDS,
        scopes=_finetune.SCOPES,
        summary="baseline: further training on the retain data",
        check=_finetune.check_finetune,
    ),
    "gradient_ascent": Method(
        name="gradient_ascent",
        run=gradient_ascent,
        config=GradientAscentConfig,
        needs=_gradient_ascent.NEEDS,
        scopes=_gradient_ascent.SCOPES,
        summary="baseline: the loss of the forget data is raised (arXiv:1911.04933)",
        check=check_descends,
    ),
    "negative_gradient_plus": Method(
        name="negative_gradient_plus",
        run=negative_gradient_plus,
        config=NegativeGradientPlusConfig,
        needs=_negative_gradient_plus.NEEDS,
        scopes=_negative_gradient_plus.SCOPES,
        summary="baseline: down on retain data, up on forget data, at once (arXiv:2302.09880)",
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
    "scrub": Method(
        name="scrub",
        run=scrub,
        config=ScrubConfig,
        needs=_scrub.NEEDS,
        scopes=_scrub.SCOPES,
        summary="baseline: away from the original on forget data, not on others (arXiv:2302.09880)",
        check=_scrub.check_scrub,
    ),
    "dampening": Method(
        name="dampening",
        run=dampening,
        config=DampeningConfig,
        needs=_dampening.NEEDS,
        scopes=_dampening.SCOPES,
        summary="baseline: weights of the forget data alone are scaled down (arXiv:2308.07707)",
        check=_dampening.check_bound,
    ),
    "saliency": Method(
        name="saliency",
        run=saliency,
        config=SaliencyConfig,
        needs=_saliency.NEEDS,
        scopes=_saliency.SCOPES,
        summary="baseline: random labels, only salient weights move (SalUn, arXiv:2310.12508)",
        check=check_descends,
    ),
    "fisher_noise": Method(
        name="fisher_noise",
        run=fisher_noise,
        config=FisherNoiseConfig,
        needs=_fisher_noise.NEEDS,
        scopes=_fisher_noise.SCOPES,
        summary="baseline: noise where the retain data allow it, a new head row (arXiv:1911.04933)",
        check=_fisher_noise.check_head,
    ),
    "influence": Method(
        name="influence",
        run=influence,
        config=InfluenceConfig,
        needs=_influence.NEEDS,
        scopes=_influence.SCOPES,
        summary="baseline: one Newton step of influence functions (arXiv:2304.04934)",
    ),
    "boundary_shrink": Method(
        name="boundary_shrink",
        run=boundary_shrink,
        config=BoundaryShrinkConfig,
        needs=_boundary_shrink.NEEDS,
        scopes=_boundary_shrink.SCOPES,
        summary="baseline: forget data on the class across the boundary (arXiv:2303.11570)",
        check=_boundary_shrink.check_boundary_shrink,
    ),
    "kernel_transpose": Method(
        name="kernel_transpose",
        run=kernel_transpose,
        config=KernelTransposeConfig,
        needs=_kernel_transpose.NEEDS,
        scopes=_kernel_transpose.SCOPES,
        summary="baseline: convolution kernels transposed, then fine-tuned (arXiv:2410.01276)",
        check=_kernel_transpose.check_kernels,
    ),
    "masked_small_gradients": Method(
        name="masked_small_gradients",
        run=masked_small_gradients,
        config=MaskedSmallGradientsConfig,
        needs=_masked_small_gradients.NEEDS,
        scopes=_masked_small_gradients.SCOPES,
        summary="baseline: convolution weights drawn anew, then fine-tuned (arXiv:2410.01276)",
        check=_masked_small_gradients.check_convolutions,
    ),
    "boundary_expanding": Method(
        name="boundary_expanding",
        run=boundary_expanding,
        config=BoundaryExpandingConfig,
        needs=_boundary_expanding.NEEDS,
        scopes=_boundary_expanding.SCOPES,
        summary="baseline: forget data in a class of their own, then dropped (arXiv:2303.11570)",
        check=_boundary_expanding.check_boundary_expanding,
    ),
    "unsir": Method(
        name="unsir",
        run=unsir,
        config=UnsirConfig,
        needs=_unsir.NEEDS,
        scopes=_unsir.SCOPES,
        summary="baseline: noise under the forgotten labels, then a repair (arXiv:2111.08947)",
        check=_unsir.check_noise,
    ),
    "bad_teacher": Method(
        name="bad_teacher",
        run=bad_teacher,
        config=BadTeacherConfig,
        needs=_bad_teacher.NEEDS,
        scopes=_bad_teacher.SCOPES,
        summary="baseline: answers of an untrained network on forget data (arXiv:2205.08096)",
        check=_bad_teacher.check_bad_teacher,
    ),
    "scar": Method(
        name="scar",
        run=scar,
        config=ScarConfig,
        needs=_scar.NEEDS,
        scopes=_scar.SCOPES,
        summary="baseline: features to other classes, surrogate images hold (arXiv:2404.12922)",
        check=_scar.check_scar,
    ),
}

__all__ = [
    "METHODS",
    "BadTeacherConfig",
    "BoundaryExpandingConfig",
    "BoundaryShrinkConfig",
    "DampeningConfig",
    "DeepUnlearningConfig",
    "DimensionalAlignmentConfig",
    "FinetuneConfig",
    "FisherNoiseConfig",
    "ForgetVectorsConfig",
    "GradientAscentConfig",
    "HeadEditConfig",
    "IdentityConfig",
    "InfluenceConfig",
    "KernelTransposeConfig",
    "MaskedSmallGradientsConfig",
    "Method",
    "NegativeGradientPlusConfig",
    "RandomLabelsConfig",
    "RetrainConfig",
    "SaliencyConfig",
    "ScarConfig",
    "ScrubConfig",
    "UNSCConfig",
    "Unlearned",
    "UnlearningProblem",
    "UnsirConfig",
    "bad_teacher",
    "boundary_expanding",
    "boundary_shrink",
    "compose",
    "dampening",
    "deep_unlearning",
    "dimensional_alignment",
    "finetune",
    "fisher_noise",
    "forget_vectors",
    "gradient_ascent",
    "head_edit",
    "identity",
    "influence",
    "kernel_transpose",
    "learn_forget_vectors",
    "masked_small_gradients",
    "negative_gradient_plus",
    "random_labels",
    "retrain",
    "saliency",
    "scar",
    "scrub",
    "unsc",
    "unsir",
]
