"""Images and, over them, what speaks for their class in the eyes of each model."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxunlearn.report.drawing import FORGET, GRID, RETRAINED, WIDTH, shorten

_LONGEST = 15  # characters of a class name that fit below a picture


def saliency_panels(
    images: Num[np.ndarray, "n h w c"],
    maps: Mapping[str, Float[np.ndarray, "n h w"]],
    labels: Int[np.ndarray, " n"],
    predicted: Mapping[str, Int[np.ndarray, " n"]],
    *,
    forget: Bool[np.ndarray, " n"],
    class_names: Sequence[str],
) -> Figure:
    """A row per image: the image, then under each model what speaks for its true class.

    Forget examples stand in the left half, retained ones in the right half.

    Args:
      images: ``[n, h, w, c]`` as stored, with 1 or 3 channels: uint8, or floats of any range.
      maps: model name to maps ``[n, h, w]`` in ``[0, 1]``.
      labels: ``[n]`` class indices.
      predicted: model name to the class ``[n]`` that it answers.
      forget: ``[n]`` whether the example was to be forgotten.
      class_names: one per class.

    Returns:
      The figure.

    Raises:
      ValueError: if the arrays differ in the number of images, or there is none.

    Examples:
      >>> images, maps, labels = np.zeros((2, 8, 8, 1)), {"original": np.zeros((2, 8, 8))}, [0, 1]
      >>> drawn = {"forget": np.array([True, False]), "class_names": ["cat", "dog"]}
      >>> labels = np.array(labels)
      >>> figure = saliency_panels(images, maps, labels, {"original": labels}, **drawn)
      >>> [axes.get_xlabel() for axes in figure.axes]
      ['cat', 'cat', 'dog', 'dog']
    """
    answers = {f"answers of {model}": classes for model, classes in predicted.items()}
    _check_lengths(images, labels, forget, {**maps, **answers})
    groups = {name: np.flatnonzero(forget == (name == "forget")) for name in ("forget", "retain")}
    groups = {name: rows for name, rows in groups.items() if len(rows)}
    n_rows = max(map(len, groups.values()))
    cell = WIDTH / len(groups) / (1 + len(maps))
    height = n_rows * (min(cell, 2.0) * images.shape[1] / images.shape[2] + 0.22) + 0.55
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    halves = figure.subfigures(1, len(groups), squeeze=False, wspace=0.03)[0]
    for half, (name, rows) in zip(halves, groups.items(), strict=True):
        colour = FORGET if name == "forget" else RETRAINED
        half.suptitle(f"{name} examples", fontsize=11, color=colour)
        grid = half.subplots(n_rows, 1 + len(maps), squeeze=False)
        for axes, title in zip(grid[0], ("image", *maps), strict=True):
            axes.set_title(title, fontsize=9)
        for axes in grid[len(rows) :].flat:
            axes.set_axis_off()
        for i, line in zip(rows, grid, strict=False):
            seen = [(cams[i], int(predicted[model][i])) for model, cams in maps.items()]
            _fill_line(line, images[i], int(labels[i]), seen, class_names)
    figure.set_label(
        "Grad-CAM of the true class at the last convolution: the brighter, the more that part of "
        "the image raises the logit of the true class, each map on its own scale; a picture left "
        "grey has no such part. Below each map the class that the model answers, bold where it is "
        "the true one."
    )
    return figure


def _check_lengths(
    images: np.ndarray, labels: np.ndarray, forget: np.ndarray, others: Mapping[str, np.ndarray]
) -> None:
    lengths = {len(images), len(labels), len(forget), *map(len, others.values())}
    if lengths == {0} or len(lengths) > 1:
        raise ValueError(
            f"{len(images)} images with {len(labels)} labels, {len(forget)} forget marks and "
            f"{ {name: len(rows) for name, rows in others.items()} }: give one or more images, and "
            "one of each to every image"
        )


def _fill_line(
    line: Sequence[Axes] | np.ndarray,
    image: Num[np.ndarray, "h w c"],
    label: int,
    seen: Sequence[tuple[Float[np.ndarray, "h w"], int]],
    class_names: Sequence[str],
) -> None:
    """An image and, for each model, its map over the grey image and the class that it answers."""
    picture = _as_colours(image)
    _draw(line[0], picture, class_names[label], bold=True)
    for axes, (cam, answer) in zip(line[1:], seen, strict=True):
        _draw(axes, picture.mean(-1, keepdims=True), class_names[answer], bold=answer == label)
        axes.imshow(_overlay(cam))


def _draw(axes: Axes, picture: Float[np.ndarray, "h w c"], name: str, *, bold: bool) -> None:
    axes.imshow(np.broadcast_to(picture, (*picture.shape[:2], 3)))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(GRID)
    weight = "bold" if bold else "normal"
    axes.set_xlabel(shorten(name, _LONGEST), fontsize=8, fontweight=weight, parse_math=False)


def _as_colours(image: Num[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
    """Values in [0, 1]: of uint8 as they are, of floats stretched over the image's own range."""
    if image.dtype == np.uint8:
        return image / 255
    low, high = image.min(), image.max()
    return np.asarray((image - low) / (high - low if high > low else 1), dtype=float)


def _overlay(cam: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 4"]:
    """Colours of a map, transparent where it is zero (or not finite, under a diverged model)."""
    share = np.nan_to_num(cam, nan=0.0, posinf=0.0, neginf=0.0)
    colours = colormaps["inferno"](share)
    colours[..., 3] = 0.8 * np.sqrt(share)
    return colours
