"""A forget vector as an image."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from jaxunlearn.report.drawing import sheet

_CHANNELS = ("red", "green", "blue")


def vector_image(delta: Float[np.ndarray, "h w c"]) -> Figure:
    """What is added to every image, channel by channel: red adds brightness, blue takes it away.

    Args:
      delta: in pixels of [0, 1], ``[h, w, c]`` with one or three channels.

    Returns:
      The figure; all channels on one scale.

    Examples:
      >>> figure = vector_image(np.zeros((4, 4, 1)))
      >>> len(figure.axes)  # the image and its scale
      2
    """
    channels = delta.shape[-1]
    figure, panels = sheet(3.2, channels)
    figure.set_layout_engine("constrained")
    largest = max(float(np.abs(delta).max()), 1e-12)
    for number, axes in enumerate(panels):
        image = axes.imshow(delta[..., number], cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set(xticks=[], yticks=[], title=_CHANNELS[number] if channels == 3 else "")
    figure.colorbar(image, ax=panels, pad=0.01).ax.tick_params(labelsize=9)
    figure.set_label(
        "The vector that is added to every input, in pixels of [0, 1]; Euclidean norm "
        f"{np.linalg.norm(delta):.3g}, largest entry {largest:.3g}."
    )
    return figure
