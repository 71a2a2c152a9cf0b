"""Closed-form edits of kernels: what a model reads on some data is taken out of its weights."""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxunlearn.layers import LayerSpec, leaves_by_path, map_kernel, path_name
from jaxunlearn.projectors import Projector, check_projectors


def suppress_subspace(
    params: optax.Params,
    specs: Mapping[str, LayerSpec],
    *,
    forget: Mapping[str, Projector],
    retain: Mapping[str, Projector] | None = None,
) -> optax.Params:
    """Remove from every kernel what lies in the forget space and not also in the retain space.

    ``K' = K - P_f (I - P_r) K`` for the kernel as a matrix ``[d_in, d_out]``, in one step from the
    original weights: no gradients. Deep Unlearning (arXiv:2312.00761); without ``retain``,
    ``K' = K - P_f K``. Biases, norms and every other leaf stay as they are. Any projectors will do:
    spectral or solved, hard or soft; the order matters, as the two need not commute.

    Args:
      params: the params collection.
      specs: layers by path, from :func:`jaxunlearn.capture.describe_layers`.
      forget: ``P_f`` by layer path; layers that are not named are not edited.
      retain: ``P_r`` of the same layers.

    Returns:
      Parameters of the same structure, shapes and dtypes.

    Raises:
      ValueError: a layer without spec, retain projector or kernel; a projector that does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxunlearn.subspace import eigenbasis, top_eigenspace
      >>> spec = LayerSpec("head", (2, 1))
      >>> P = top_eigenspace(eigenbasis(jnp.diag(jnp.array([1.0, 0.0]))), energy=1.0)
      >>> params = {"head": {"kernel": jnp.ones((2, 1))}}
      >>> edited = suppress_subspace(params, {"head": spec}, forget={"head": P})
      >>> edited["head"]["kernel"].ravel().tolist()
      [0.0, 1.0]
    """
    if retain is not None and (missing := sorted(forget.keys() - retain.keys())):
        raise ValueError(
            f"no retain projector for layers {missing}, which have a forget projector; give both, "
            "or retain=None to suppress the whole forget space"
        )
    leaves = leaves_by_path(params)
    for projectors in (forget, retain or {}):
        check_projectors(projectors, specs, leaves)
    layer_of = {specs[path].kernel_path: path for path in forget}

    def edit(tree_path: tuple, leaf: Array) -> Array:
        path = layer_of.get(path_name(tree_path))
        if path is None:
            return leaf

        def suppress(K: Float[Array, "*lead d_in d_out"]) -> Float[Array, "*lead d_in d_out"]:
            return K - forget[path](K if retain is None else retain[path].complement(K))

        return map_kernel(suppress, specs[path], leaf)

    return jax.tree.map_with_path(edit, params)


def silence_classes(
    params: optax.Params, head: LayerSpec, classes: Collection[int], *, value: float = -1e4
) -> optax.Params | None:
    """The head edit: the bias of some classes is set so low that they are never predicted.

    A control, not a method: accuracy on these classes becomes 0, and every feature stays as it was.
    A measure by which the result looks unlearned looks at the head alone.

    Args:
      params: the params collection.
      head: the last dense layer, ``k`` outputs.
      classes: class ids.
      value: of their bias.

    Returns:
      Parameters of the same structure; None if the head has no bias ``[k]``.

    Raises:
      ValueError: a class that the head does not have.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> silence_classes(params, LayerSpec("head", (2, 3)), [1])["head"]["bias"].tolist()
      [1.0, -10000.0, 1.0]
    """
    if wrong := sorted(c for c in classes if not 0 <= c < head.d_out):
        raise ValueError(f"classes {wrong} are not among the {head.d_out} outputs of {head.path!r}")
    bias_path = "/".join([*head.kernel_path.split("/")[:-1], "bias"])
    bias = leaves_by_path(params).get(bias_path)
    if bias is None or bias.shape != (head.d_out,):
        return None

    def edit(tree_path: tuple, leaf: Array) -> Array:
        if path_name(tree_path) != bias_path:
            return leaf
        return leaf.at[jnp.array(sorted(classes))].set(value)

    return jax.tree.map_with_path(edit, params)
