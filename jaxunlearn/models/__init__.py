"""Classifiers: linen modules, called as ``model.apply(variables, inputs, train=False)``.

Every model takes normalised floating-point inputs (images ``[b, h, w, c]``), returns logits
``[b, k]`` and is in inference mode by default. The last dense layer is named ``head``; its input is
the output of the module ``penultimate``, so ``capture_intermediates`` finds the features of every
model at one place.
"""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from jaxunlearn.models.alexnet_small import AlexNetSmall
from jaxunlearn.models.allcnn import AllCNN
from jaxunlearn.models.cnn39k import CNN39k
from jaxunlearn.models.logits import check_logits
from jaxunlearn.models.mlp import MLP
from jaxunlearn.models.resnet import ResNet
from jaxunlearn.models.resnet8 import ResNet8
from jaxunlearn.models.rules import (
    ALLCNN,
    CNN39K,
    MLP_TOY,
    RESNET8,
    RESNET_CIFAR,
    TINYVGG,
    VGG11,
    VGG16,
    VIT,
    Rule,
    Rules,
    vgg_rules,
)
from jaxunlearn.models.tinyvgg import TinyVGG
from jaxunlearn.models.vgg import VGG, VGG11_STAGES, VGG16_STAGES
from jaxunlearn.models.vit import ViT
from jaxunlearn.models.weight_files import read_arrays
from jaxunlearn.models.weights import from_keras, from_torch, load_weights

__all__ = [
    "ALLCNN",
    "CNN39K",
    "MLP",
    "MLP_TOY",
    "MODELS",
    "RESNET8",
    "RESNET_CIFAR",
    "TINYVGG",
    "VGG",
    "VGG11",
    "VGG16",
    "VIT",
    "WEIGHT_RULES",
    "AlexNetSmall",
    "AllCNN",
    "CNN39k",
    "ResNet",
    "ResNet8",
    "Rule",
    "Rules",
    "TinyVGG",
    "ViT",
    "build",
    "check_logits",
    "from_keras",
    "from_torch",
    "load_weights",
    "read_arrays",
    "vgg_rules",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "allcnn": AllCNN,
    "alexnet_small": AlexNetSmall,
    "vgg11": partial(VGG, stages=VGG11_STAGES),
    "vgg16": partial(VGG, stages=VGG16_STAGES),
    "resnet20": partial(ResNet, stages=(3, 3, 3)),
    "resnet32": partial(ResNet, stages=(5, 5, 5)),
    "resnet44": partial(ResNet, stages=(7, 7, 7)),
    "resnet56": partial(ResNet, stages=(9, 9, 9)),
    "resnet18": partial(ResNet, stages=(2, 2, 2, 2), channels=(64, 128, 256, 512), shortcut="B"),
    "vit": ViT,
    "resnet8": ResNet8,
    "tinyvgg": TinyVGG,
    "cnn39k": CNN39k,
}
"""Name, as in a run's configuration, to the constructor with that net's defaults."""

WEIGHT_RULES: dict[str, Rules] = {
    "allcnn": ALLCNN,
    "vgg11": VGG11,
    "vgg16": VGG16,
    **dict.fromkeys(("resnet20", "resnet32", "resnet44", "resnet56", "resnet18"), RESNET_CIFAR),
    "vit": VIT,
    "resnet8": RESNET8,
    "tinyvgg": TINYVGG,
    "cnn39k": CNN39K,
}
"""Model to the mapping from the names of weights that others publish for it."""

_NOT_OPTIONS = ("num_classes", "parent", "name")


def build(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """A model by name.

    Args:
      name: a key of ``MODELS``.
      num_classes: number of logits.
      **options: attributes of the model other than its defaults; lists, as configuration files have
        them, become tuples.

    Raises:
      ValueError: the name or an option is unknown, or there are fewer than two classes.

    Examples:
      >>> build("mlp", num_classes=3, features=[16]).features
      (16,)
    """
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"model {name!r} is unknown: {hint}choose one of {', '.join(MODELS)}")
    known = [key for key in inspect.signature(MODELS[name]).parameters if key not in _NOT_OPTIONS]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"model {name!r} has no option {', '.join(unknown)}: its options are {', '.join(known)}"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier has at least 2")
    return MODELS[name](num_classes=num_classes, **{k: _tuples(v) for k, v in options.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
