"""Machine unlearning for JAX.

The public names, each where it is defined. They are imported when they are first used, so that
``jaxunlearn --help`` need not wait for JAX, nor a training loop for what draws the reports.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxunlearn.activations import features as features
    from jaxunlearn.activations import with_features as with_features
    from jaxunlearn.backdoor import plant_backdoor as plant_backdoor
    from jaxunlearn.batches import Batches as Batches
    from jaxunlearn.capture import capture_inputs as capture_inputs
    from jaxunlearn.capture import capture_outputs as capture_outputs
    from jaxunlearn.capture import describe_layers as describe_layers
    from jaxunlearn.capture import layer_inputs as layer_inputs
    from jaxunlearn.checkpoint import restore_variables as restore_variables
    from jaxunlearn.checkpoint import save_variables as save_variables
    from jaxunlearn.config import RunConfig as RunConfig
    from jaxunlearn.config import TriggerConfig as TriggerConfig
    from jaxunlearn.config import config_from_mapping as config_from_mapping
    from jaxunlearn.config import load_config as load_config
    from jaxunlearn.contour_assessment import loss_contour as loss_contour
    from jaxunlearn.convolution import fast_convolutions as fast_convolutions
    from jaxunlearn.data import Source as Source
    from jaxunlearn.data import Splits as Splits
    from jaxunlearn.data import split as split
    from jaxunlearn.edits import silence_classes as silence_classes
    from jaxunlearn.edits import suppress_subspace as suppress_subspace
    from jaxunlearn.epochs import epoch_inputs as epoch_inputs
    from jaxunlearn.epochs import run_epoch as run_epoch
    from jaxunlearn.evaluation.audit import AuditDraws as AuditDraws
    from jaxunlearn.evaluation.audit import audit as audit
    from jaxunlearn.evaluation.cka import layer_cka as layer_cka
    from jaxunlearn.evaluation.cka import linear_cka as linear_cka
    from jaxunlearn.evaluation.clustering import k_means as k_means
    from jaxunlearn.evaluation.confidence_svc import fit_confidence_svc as fit_confidence_svc
    from jaxunlearn.evaluation.contour import change_plane as change_plane
    from jaxunlearn.evaluation.contour import contour_axis as contour_axis
    from jaxunlearn.evaluation.contour import plane_losses as plane_losses
    from jaxunlearn.evaluation.distance import activation_distance as activation_distance
    from jaxunlearn.evaluation.distance import agreement as agreement
    from jaxunlearn.evaluation.distance import js_divergence as js_divergence
    from jaxunlearn.evaluation.distance import margin_gap as margin_gap
    from jaxunlearn.evaluation.distance import zero_retrain_forgetting as zero_retrain_forgetting
    from jaxunlearn.evaluation.feature_metrics import feature_metrics as feature_metrics
    from jaxunlearn.evaluation.forgetting_quality import forgetting_quality as forgetting_quality
    from jaxunlearn.evaluation.klom import energy_distance as energy_distance
    from jaxunlearn.evaluation.klom import klom as klom
    from jaxunlearn.evaluation.loss_attack import cross_entropies as cross_entropies
    from jaxunlearn.evaluation.loss_attack import logistic_loss as logistic_loss
    from jaxunlearn.evaluation.membership import svc_confidence_kodge as svc_confidence_kodge
    from jaxunlearn.evaluation.membership import svc_confidence_optml as svc_confidence_optml
    from jaxunlearn.evaluation.membership import svc_confidence_unsc as svc_confidence_unsc
    from jaxunlearn.evaluation.probe import linear_probe as linear_probe
    from jaxunlearn.evaluation.relearning import anamnesis_index as anamnesis_index
    from jaxunlearn.evaluation.relearning import relearn_target as relearn_target
    from jaxunlearn.evaluation.relearning import relearn_time as relearn_time
    from jaxunlearn.evaluation.report import evaluate_model as evaluate_model
    from jaxunlearn.evaluation.report import gap_to_retrain as gap_to_retrain
    from jaxunlearn.evaluation.report import predict as predict
    from jaxunlearn.evaluation.rmia import Confidences as Confidences
    from jaxunlearn.evaluation.rmia import choose_offline_a as choose_offline_a
    from jaxunlearn.evaluation.rmia import rmia as rmia
    from jaxunlearn.evaluation.rmia import rmia_null as rmia_null
    from jaxunlearn.evaluation.roc import auc as auc
    from jaxunlearn.evaluation.roc import roc_curve as roc_curve
    from jaxunlearn.evaluation.roc import tpr_at_fpr as tpr_at_fpr
    from jaxunlearn.evaluation.scores import adaptive_unlearning_score as adaptive_unlearning_score
    from jaxunlearn.evaluation.scores import destinations as destinations
    from jaxunlearn.evaluation.scores import indiscernibility as indiscernibility
    from jaxunlearn.evaluation.scores import interclass_confusion as interclass_confusion
    from jaxunlearn.evaluation.scores import retention_deviation as retention_deviation
    from jaxunlearn.evaluation.scores import tug_of_war as tug_of_war
    from jaxunlearn.evaluation.threshold_attacks import Outputs as Outputs
    from jaxunlearn.evaluation.threshold_attacks import membership_score as membership_score
    from jaxunlearn.evaluation.threshold_attacks import population_umia as population_umia
    from jaxunlearn.evaluation.threshold_attacks import threshold_attack as threshold_attack
    from jaxunlearn.evaluation.ulira import likelihood_ratio as likelihood_ratio
    from jaxunlearn.evaluation.ulira import ulira as ulira
    from jaxunlearn.experiment import run as run
    from jaxunlearn.families import fit_family as fit_family
    from jaxunlearn.gram import GramState as GramState
    from jaxunlearn.gram import accumulate_class_grams as accumulate_class_grams
    from jaxunlearn.gram import accumulate_gram as accumulate_gram
    from jaxunlearn.gram import downdate_gram as downdate_gram
    from jaxunlearn.gram import merge_grams as merge_grams
    from jaxunlearn.layers import LayerSpec as LayerSpec
    from jaxunlearn.linalg import psd_eigh as psd_eigh
    from jaxunlearn.methods import METHODS as METHODS
    from jaxunlearn.methods import BadTeacherConfig as BadTeacherConfig
    from jaxunlearn.methods import BoundaryExpandingConfig as BoundaryExpandingConfig
    from jaxunlearn.methods import BoundaryShrinkConfig as BoundaryShrinkConfig
    from jaxunlearn.methods import DampeningConfig as DampeningConfig
    from jaxunlearn.methods import DeepUnlearningConfig as DeepUnlearningConfig
    from jaxunlearn.methods import DimensionalAlignmentConfig as DimensionalAlignmentConfig
    from jaxunlearn.methods import FinetuneConfig as FinetuneConfig
    from jaxunlearn.methods import FisherNoiseConfig as FisherNoiseConfig
    from jaxunlearn.methods import ForgetVectorsConfig as ForgetVectorsConfig
    from jaxunlearn.methods import GradientAscentConfig as GradientAscentConfig
    from jaxunlearn.methods import HeadEditConfig as HeadEditConfig
    from jaxunlearn.methods import IdentityConfig as IdentityConfig
    from jaxunlearn.methods import InfluenceConfig as InfluenceConfig
    from jaxunlearn.methods import KernelTransposeConfig as KernelTransposeConfig
    from jaxunlearn.methods import MaskedSmallGradientsConfig as MaskedSmallGradientsConfig
    from jaxunlearn.methods import NegativeGradientPlusConfig as NegativeGradientPlusConfig
    from jaxunlearn.methods import RandomLabelsConfig as RandomLabelsConfig
    from jaxunlearn.methods import RetrainConfig as RetrainConfig
    from jaxunlearn.methods import SaliencyConfig as SaliencyConfig
    from jaxunlearn.methods import ScarConfig as ScarConfig
    from jaxunlearn.methods import ScrubConfig as ScrubConfig
    from jaxunlearn.methods import Unlearned as Unlearned
    from jaxunlearn.methods import UnlearningProblem as UnlearningProblem
    from jaxunlearn.methods import UNSCConfig as UNSCConfig
    from jaxunlearn.methods import UnsirConfig as UnsirConfig
    from jaxunlearn.methods import bad_teacher as bad_teacher
    from jaxunlearn.methods import boundary_expanding as boundary_expanding
    from jaxunlearn.methods import boundary_shrink as boundary_shrink
    from jaxunlearn.methods import dampening as dampening
    from jaxunlearn.methods import deep_unlearning as deep_unlearning
    from jaxunlearn.methods import finetune as finetune
    from jaxunlearn.methods import fisher_noise as fisher_noise
    from jaxunlearn.methods import gradient_ascent as gradient_ascent
    from jaxunlearn.methods import head_edit as head_edit
    from jaxunlearn.methods import identity as identity
    from jaxunlearn.methods import influence as influence
    from jaxunlearn.methods import kernel_transpose as kernel_transpose
    from jaxunlearn.methods import learn_forget_vectors as learn_forget_vectors
    from jaxunlearn.methods import masked_small_gradients as masked_small_gradients
    from jaxunlearn.methods import negative_gradient_plus as negative_gradient_plus
    from jaxunlearn.methods import random_labels as random_labels
    from jaxunlearn.methods import retrain as retrain
    from jaxunlearn.methods import saliency as saliency
    from jaxunlearn.methods import scar as scar
    from jaxunlearn.methods import scrub as scrub
    from jaxunlearn.methods import unsc as unsc
    from jaxunlearn.methods import unsir as unsir
    from jaxunlearn.network import with_preprocessing as with_preprocessing
    from jaxunlearn.nnx_models import nnx_model as nnx_model
    from jaxunlearn.preprocessing import augmenter as augmenter
    from jaxunlearn.preprocessing import normalizer as normalizer
    from jaxunlearn.projectors import CholeskyProjector as CholeskyProjector
    from jaxunlearn.projectors import DualProjector as DualProjector
    from jaxunlearn.projectors import Projector as Projector
    from jaxunlearn.projectors import SpectralProjector as SpectralProjector
    from jaxunlearn.randomized import randomized_eigh as randomized_eigh
    from jaxunlearn.relearning import relearn_models as relearn_models
    from jaxunlearn.sharding import data_mesh as data_mesh
    from jaxunlearn.sharding import replicate as replicate
    from jaxunlearn.sharding import shard_batch as shard_batch
    from jaxunlearn.sharding import start_processes as start_processes
    from jaxunlearn.sharding import unreplicate as unreplicate
    from jaxunlearn.soft_projectors import certified_basis as certified_basis
    from jaxunlearn.soft_projectors import importance as importance
    from jaxunlearn.soft_projectors import importance_solve as importance_solve
    from jaxunlearn.soft_projectors import importance_solve_rows as importance_solve_rows
    from jaxunlearn.sources import from_arrays as from_arrays
    from jaxunlearn.sources import load_source as load_source
    from jaxunlearn.steps import TrainState as TrainState
    from jaxunlearn.steps import train_step as train_step
    from jaxunlearn.subspace import Eigenbasis as Eigenbasis
    from jaxunlearn.subspace import eigenbasis as eigenbasis
    from jaxunlearn.subspace import eigenbasis_of_rows as eigenbasis_of_rows
    from jaxunlearn.subspace import leading_space as leading_space
    from jaxunlearn.subspace import null_space as null_space
    from jaxunlearn.subspace import top_eigenspace as top_eigenspace
    from jaxunlearn.subspace import truncate as truncate
    from jaxunlearn.surrogates import surrogate_images as surrogate_images
    from jaxunlearn.taps import tapped as tapped
    from jaxunlearn.training import accuracy as accuracy
    from jaxunlearn.training import fit as fit
    from jaxunlearn.training import sgd as sgd
    from jaxunlearn.transforms import mask_updates as mask_updates
    from jaxunlearn.transforms import project_gradients as project_gradients
    from jaxunlearn.transforms import project_updates as project_updates

_HOME = {
    "AuditDraws": "evaluation.audit",
    "BadTeacherConfig": "methods",
    "Batches": "batches",
    "BoundaryExpandingConfig": "methods",
    "BoundaryShrinkConfig": "methods",
    "CholeskyProjector": "projectors",
    "Confidences": "evaluation.rmia",
    "DampeningConfig": "methods",
    "DeepUnlearningConfig": "methods",
    "DimensionalAlignmentConfig": "methods",
    "DualProjector": "projectors",
    "Eigenbasis": "subspace",
    "FinetuneConfig": "methods",
    "FisherNoiseConfig": "methods",
    "ForgetVectorsConfig": "methods",
    "GradientAscentConfig": "methods",
    "GramState": "gram",
    "HeadEditConfig": "methods",
    "IdentityConfig": "methods",
    "InfluenceConfig": "methods",
    "KernelTransposeConfig": "methods",
    "LayerSpec": "layers",
    "METHODS": "methods",
    "MaskedSmallGradientsConfig": "methods",
    "NegativeGradientPlusConfig": "methods",
    "Outputs": "evaluation.threshold_attacks",
    "Projector": "projectors",
    "RandomLabelsConfig": "methods",
    "RetrainConfig": "methods",
    "RunConfig": "config",
    "SaliencyConfig": "methods",
    "ScarConfig": "methods",
    "ScrubConfig": "methods",
    "Source": "data",
    "SpectralProjector": "projectors",
    "Splits": "data",
    "TrainState": "steps",
    "TriggerConfig": "config",
    "UNSCConfig": "methods",
    "Unlearned": "methods",
    "UnlearningProblem": "methods",
    "UnsirConfig": "methods",
    "accumulate_class_grams": "gram",
    "accumulate_gram": "gram",
    "accuracy": "training",
    "activation_distance": "evaluation.distance",
    "adaptive_unlearning_score": "evaluation.scores",
    "agreement": "evaluation.distance",
    "anamnesis_index": "evaluation.relearning",
    "auc": "evaluation.roc",
    "audit": "evaluation.audit",
    "augmenter": "preprocessing",
    "bad_teacher": "methods",
    "boundary_expanding": "methods",
    "boundary_shrink": "methods",
    "capture_inputs": "capture",
    "capture_outputs": "capture",
    "certified_basis": "soft_projectors",
    "change_plane": "evaluation.contour",
    "choose_offline_a": "evaluation.rmia",
    "config_from_mapping": "config",
    "contour_axis": "evaluation.contour",
    "cross_entropies": "evaluation.loss_attack",
    "dampening": "methods",
    "data_mesh": "sharding",
    "deep_unlearning": "methods",
    "describe_layers": "capture",
    "destinations": "evaluation.scores",
    "downdate_gram": "gram",
    "eigenbasis": "subspace",
    "eigenbasis_of_rows": "subspace",
    "energy_distance": "evaluation.klom",
    "epoch_inputs": "epochs",
    "evaluate_model": "evaluation.report",
    "fast_convolutions": "convolution",
    "feature_metrics": "evaluation.feature_metrics",
    "features": "activations",
    "finetune": "methods",
    "fisher_noise": "methods",
    "fit": "training",
    "fit_confidence_svc": "evaluation.confidence_svc",
    "fit_family": "families",
    "forgetting_quality": "evaluation.forgetting_quality",
    "from_arrays": "sources",
    "gap_to_retrain": "evaluation.report",
    "gradient_ascent": "methods",
    "head_edit": "methods",
    "identity": "methods",
    "importance": "soft_projectors",
    "importance_solve": "soft_projectors",
    "importance_solve_rows": "soft_projectors",
    "indiscernibility": "evaluation.scores",
    "influence": "methods",
    "interclass_confusion": "evaluation.scores",
    "js_divergence": "evaluation.distance",
    "k_means": "evaluation.clustering",
    "kernel_transpose": "methods",
    "klom": "evaluation.klom",
    "layer_cka": "evaluation.cka",
    "layer_inputs": "capture",
    "leading_space": "subspace",
    "learn_forget_vectors": "methods",
    "likelihood_ratio": "evaluation.ulira",
    "linear_cka": "evaluation.cka",
    "linear_probe": "evaluation.probe",
    "load_config": "config",
    "load_source": "sources",
    "logistic_loss": "evaluation.loss_attack",
    "loss_contour": "contour_assessment",
    "margin_gap": "evaluation.distance",
    "mask_updates": "transforms",
    "masked_small_gradients": "methods",
    "membership_score": "evaluation.threshold_attacks",
    "merge_grams": "gram",
    "negative_gradient_plus": "methods",
    "nnx_model": "nnx_models",
    "normalizer": "preprocessing",
    "null_space": "subspace",
    "plane_losses": "evaluation.contour",
    "plant_backdoor": "backdoor",
    "population_umia": "evaluation.threshold_attacks",
    "predict": "evaluation.report",
    "project_gradients": "transforms",
    "project_updates": "transforms",
    "psd_eigh": "linalg",
    "random_labels": "methods",
    "randomized_eigh": "randomized",
    "relearn_models": "relearning",
    "relearn_target": "evaluation.relearning",
    "relearn_time": "evaluation.relearning",
    "replicate": "sharding",
    "restore_variables": "checkpoint",
    "retention_deviation": "evaluation.scores",
    "retrain": "methods",
    "rmia": "evaluation.rmia",
    "rmia_null": "evaluation.rmia",
    "roc_curve": "evaluation.roc",
    "run": "experiment",
    "run_epoch": "epochs",
    "saliency": "methods",
    "save_variables": "checkpoint",
    "scar": "methods",
    "scrub": "methods",
    "sgd": "training",
    "shard_batch": "sharding",
    "silence_classes": "edits",
    "split": "data",
    "start_processes": "sharding",
    "suppress_subspace": "edits",
    "surrogate_images": "surrogates",
    "svc_confidence_kodge": "evaluation.membership",
    "svc_confidence_optml": "evaluation.membership",
    "svc_confidence_unsc": "evaluation.membership",
    "tapped": "taps",
    "threshold_attack": "evaluation.threshold_attacks",
    "top_eigenspace": "subspace",
    "tpr_at_fpr": "evaluation.roc",
    "train_step": "steps",
    "truncate": "subspace",
    "tug_of_war": "evaluation.scores",
    "ulira": "evaluation.ulira",
    "unreplicate": "sharding",
    "unsc": "methods",
    "unsir": "methods",
    "with_features": "activations",
    "with_preprocessing": "network",
    "zero_retrain_forgetting": "evaluation.distance",
}

__all__ = ["__version__", *_HOME]

if not TYPE_CHECKING:  # a type checker reads the imports above, and finds what is not there

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
