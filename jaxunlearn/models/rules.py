"""Which module of another framework is which module of ours: data, one tuple of rules per network.

A rule is a pair of a regular expression for the whole name of a module and the flax path that it
becomes, with groups as in ``re.Match.expand``; ``Rule`` says more than a pair. The first rule that
fits counts. A parameter that belongs to no layer (``class_token``) is named by itself.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxunlearn.models.vgg import VGG11_STAGES, VGG16_STAGES


class Rule(NamedTuple):
    r"""Where the arrays of some modules go.

    Attributes:
      pattern: regular expression for a whole module name, or for the name of a bare parameter.
      path: path of the flax module, or of the bare parameter.
      flattened: shape (c, h, w) of the map that PyTorch flattens in front of a dense layer: its
        rows are put into flax's order, (h, w, c). Keras flattens as flax does.
      split: flax modules below ``path`` among which the output axis is divided in equal parts, in
        this order, as for the packed projections of attention.

    Examples:
      >>> Rule(r"fc\.(\d)", r"dense\1", flattened=(16, 5, 5)).path
      'dense\\1'
    """

    pattern: str
    path: str
    flattened: tuple[int, int, int] | None = None
    split: tuple[str, ...] = ()


Rules = Sequence[Rule | tuple[str, str]]


def vgg_rules(stages: Sequence[Sequence[int]], *, side: int = 1, hidden: int = 2) -> Rules:
    r"""Torchvision's VGG with batch norm into ``VGG``.

    Args:
      stages: of the network.
      side: of the last map in pixels: 1 for images of 32 x 32 and five stages, 7 for 224 x 224.
      hidden: number of hidden dense layers.

    Examples:
      >>> vgg_rules(((6,), (8, 10)))[2:4]
      (('features\\.4', 'stage2_block0/conv'), ('features\\.5', 'stage2_block0/norm'))
    """
    rules: list[Rule | tuple[str, str]] = []
    place = 0
    for stage, widths in enumerate(stages, start=1):
        for number in range(len(widths)):
            block = f"stage{stage}_block{number}"
            rules += [
                (rf"features\.{place}", f"{block}/conv"),
                (rf"features\.{place + 1}", f"{block}/norm"),
            ]
            place += 3  # the ReLU is the third
        place += 1  # pooling
    dense = [*(f"dense{number + 1}" for number in range(hidden)), "head"]
    names = [(rf"classifier\.{3 * number}", layer) for number, layer in enumerate(dense)]
    first = Rule(*names[0], flattened=(stages[-1][-1], side, side))
    return (*rules, first, *names[1:])


def _encoder_block(torch: str, number: int) -> Iterable[Rule]:
    ours = f"block{number}"
    yield Rule(rf"{torch}\.ln_(\d)", rf"{ours}/norm\1")
    parts = ("query", "key", "value")
    yield Rule(rf"{torch}\.self_attention\.in_proj", f"{ours}/attention", split=parts)
    yield Rule(rf"{torch}\.self_attention\.out_proj", f"{ours}/attention/out")
    yield Rule(rf"{torch}\.mlp\.(0|linear_1)", f"{ours}/dense1")
    yield Rule(rf"{torch}\.mlp\.(3|linear_2)", f"{ours}/dense2")


MLP_TOY: Rules = ((r"fc1", "dense1"), (r"fc2", "head"))
"""Two dense layers ``fc1``, ``fc2`` into ``MLP(features=(width,))``."""

ALLCNN: Rules = (
    *(
        (rf"features\.{place}\.{part}", f"block{number}/{layer}")
        for number, place in enumerate((0, 1, 2, 4, 5, 6, 8, 9), start=1)
        for part, layer in enumerate(("conv", "norm"))
    ),
    (r"fc\.0", "head"),
)
"""The AllCNN of the UNSC code into ``AllCNN``; places 3 and 7 there hold no weights."""

RESNET_CIFAR: Rules = (
    (r"conv1", "stem/conv"),
    (r"bn1", "stem/norm"),
    (r"layer(\d+)\.(\d+)\.conv(\d)", r"stage\1_block\2/conv\3"),
    (r"layer(\d+)\.(\d+)\.bn(\d)", r"stage\1_block\2/norm\3"),
    (r"layer(\d+)\.(\d+)\.(shortcut|downsample)\.0", r"stage\1_block\2/shortcut_conv"),
    (r"layer(\d+)\.(\d+)\.(shortcut|downsample)\.1", r"stage\1_block\2/shortcut_norm"),
    (r"linear|fc", "head"),
)
"""CIFAR residual networks with the usual PyTorch names into ``ResNet``, either shortcut."""

VGG11: Rules = vgg_rules(VGG11_STAGES)
"""Torchvision's ``vgg11_bn`` for images of 32 x 32 into ``vgg11``."""

VGG16: Rules = vgg_rules(VGG16_STAGES)
"""Torchvision's ``vgg16_bn`` for images of 32 x 32 into ``vgg16``."""

VIT: Rules = (
    ("conv_proj", "patches"),
    ("class_token", "class_token"),
    (r"encoder\.pos_embedding", "positions"),
    *(
        rule
        for number in range(32)  # as deep as any that is published
        for rule in _encoder_block(rf"encoder\.layers\.encoder_layer_{number}", number + 1)
    ),
    (r"encoder\.ln", "norm"),
    (r"heads\.head", "head"),
)
"""Torchvision's vision transformers into ``ViT``."""

TINYVGG: Rules = (
    (r"block_1\.0", "conv1"),
    (r"block_1\.2", "conv2"),
    (r"block_2\.0", "conv3"),
    (r"block_2\.2", "conv4"),
    Rule(r"classifier\.1", "head", flattened=(10, 7, 7)),
)
"""TinyVGG of PyTorch tutorials, 10 channels and images of 28 x 28, into ``TinyVGG``."""

CNN39K: Rules = (("conv1", "conv1"), Rule("linear", "head", flattened=(20, 14, 14)))
"""The two layers of stanweer1's network for images of 28 x 28 into ``CNN39k``."""

RESNET8: Rules = (
    ("conv2d", "stem_conv"),
    ("batch_normalization", "stem_norm"),
    ("conv2d_1", "stage1_block0/conv1"),
    ("conv2d_2", "stage1_block0/conv2"),
    ("conv2d_3", "stage2_block0/conv1"),
    ("conv2d_4", "stage2_block0/conv2"),
    ("conv2d_5", "stage2_block0/shortcut_conv"),
    ("conv2d_6", "stage3_block0/conv1"),
    ("conv2d_7", "stage3_block0/conv2"),
    ("conv2d_8", "stage3_block0/shortcut_conv"),
    ("batch_normalization_1", "stage1_block0/norm1"),
    ("batch_normalization_2", "stage1_block0/norm2"),
    ("batch_normalization_3", "stage2_block0/norm1"),
    ("batch_normalization_4", "stage2_block0/norm2"),
    ("batch_normalization_5", "stage3_block0/norm1"),
    ("batch_normalization_6", "stage3_block0/norm2"),
    ("dense", "head"),
)
"""The Keras ResNet-8 of MLPerf Tiny into ``ResNet8``."""
