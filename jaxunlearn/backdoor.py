"""A backdoor to be removed: a small patch on some training images that stands for a class.

Some training images get the patch and the target's label, so that the original model learns to see
the target wherever the patch is. They are the forget data; who forgets them should no longer obey
the patch. The test set stays as it was and is followed by copies with the patch, labelled with the
target: accuracy on these is the success of the attack, and the retrained model's is the goal.
"""

import dataclasses

import numpy as np

from jaxunlearn.config import TriggerConfig
from jaxunlearn.data import Examples, Source, Splits, share_count, split, train_count
from jaxunlearn.typed import typed


def plant_backdoor(
    source: Source,
    trigger: TriggerConfig,
    *,
    share: float,
    validation: float = 0.0,
    seed: int = 0,
) -> tuple[Source, Splits]:
    """Poison a source, and split it by what is poisoned; the given source stays as it is.

    Poisoned are round(share · n) of the n images of the train part, drawn among those that are not
    of the target class. One copy of the data in memory, two of the test set.

    Args:
      source: images ``[n, h, w, c]``.
      trigger: the patch, and the class that it stands for.
      share: of the train part, in (0, 1).
      validation: share of the train set, its tail in stored order, that is kept out of training and
        stays clean.
      seed: of the draw.

    Returns:
      The poisoned source, its test set followed by triggered copies of all test images that are not
      of the target class. The splits: ``forget`` are the poisoned images, ``forget_test`` the
      triggered copies, ``retain_test`` the clean test set; no class is forgotten.

    Raises:
      ValueError: inputs that are no images; a target that is no class; a patch that does not fit
        into the image, or is brighter than the images can be; a share outside (0, 1), of less than
        one image or of more than there are of other classes.

    Examples:
      >>> from jaxunlearn.sources import load_source
      >>> poisoned, splits = plant_backdoor(load_source("digits"), TriggerConfig(size=2), share=0.1)
      >>> len(splits.forget), len(splits.forget_test), len(splits.retain_test)
      (144, 324, 360)
      >>> poisoned.train.inputs[splits.forget, -2:, -2:].min().item()
      16

    Gu, Dolan-Gavitt and Garg, BadNets, arXiv:1708.06733.
    """
    brightness = _checked_brightness(source, trigger)
    train, test, target = source.train, source.test, trigger.target
    num_train = train_count(len(train.labels), validation)
    count = share_count("backdoor", share, num_train)
    others = np.flatnonzero(train.labels[:num_train] != target)
    if count > len(others):
        raise ValueError(
            f"scope 'backdoor' got forget = {share}: {count} of {num_train} training images, but "
            f"only {len(others)} are not of the target class {target}; write a smaller share"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(others, count, replace=False))
    images, labels = train.inputs.copy(), train.labels.copy()
    images[chosen], labels[chosen] = _stamped(images[chosen], trigger, brightness), target
    clean = len(test.labels)
    tested = np.flatnonzero(test.labels != target)
    triggered = _stamped(test.inputs[tested], trigger, brightness)
    poisoned = dataclasses.replace(
        source,
        train=Examples(images, labels),
        test=Examples(
            np.concatenate([test.inputs, triggered]),
            np.concatenate([test.labels, np.full(len(tested), target, test.labels.dtype)]),
        ),
    )
    splits = split(poisoned, scope="samples", forget=chosen, validation=validation)
    return poisoned, splits._replace(
        forget_test=np.arange(clean, clean + len(tested)),
        retain_test=np.arange(clean),
        scope="backdoor",
    )


def _stamped(images: np.ndarray, trigger: TriggerConfig, brightness: float) -> np.ndarray:
    """A copy of images ``[n, h, w, c]`` with the patch."""
    vertical, horizontal = trigger.corner.split("_")
    first, last = slice(trigger.size), slice(-trigger.size, None)
    rows = first if vertical == "top" else last
    columns = first if horizontal == "left" else last
    stamped = images.copy()
    stamped[:, rows, columns] = brightness
    return stamped


def _checked_brightness(source: Source, trigger: TriggerConfig) -> float:
    """The patch's stored value; refuses a trigger that the source cannot take."""
    typed(TriggerConfig, dataclasses.asdict(trigger), where="trigger")  # made in Python: unchecked
    inputs = source.train.inputs
    if inputs.ndim != 4:
        raise ValueError(
            f"scope 'backdoor': inputs {inputs.shape} of {source.name}; wanted images "
            "[n, height, width, channels], as a patch has a place; write x.reshape(len(x), height, "
            "width, channels), which the mlp flattens by itself"
        )
    if trigger.target >= source.num_classes:
        raise ValueError(
            f"trigger.target = {trigger.target}: no class of {source.name}; "
            f"wanted 0 to {source.num_classes - 1}"
        )
    side = min(inputs.shape[1:3])
    if trigger.size >= side:
        raise ValueError(
            f"trigger.size = {trigger.size}: images of {source.name} are {inputs.shape[1]} x "
            f"{inputs.shape[2]} pixels; wanted a patch that is smaller, 1 to {side - 1}"
        )
    brightness = trigger.value * source.scale
    if inputs.dtype != np.uint8:
        return brightness
    if round(brightness) > 255:
        raise ValueError(
            f"trigger.value = {trigger.value}: with scale {source.scale:g} that is "
            f"{brightness:g}, and uint8 images hold at most 255; write at most "
            f"{255 / source.scale:.4g}"
        )
    return float(round(brightness))
