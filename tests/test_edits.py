"""Closed-form edits: the formula, and the weights that the public reference code computes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.capture import describe_layers, layer_inputs
from jaxunlearn.edits import suppress_subspace
from jaxunlearn.gram import accumulate_gram
from jaxunlearn.layers import LayerSpec
from jaxunlearn.soft_projectors import importance, importance_solve, importance_solve_rows
from jaxunlearn.subspace import eigenbasis, top_eigenspace

SPEC = {"fc": LayerSpec("fc", (6, 3))}
PARAMS = {
    "fc": {"kernel": jax.random.normal(jax.random.key(0), (6, 3)), "bias": jnp.ones(3)},
    "norm": {"scale": jnp.ones(3)},
}


def _soft(seed, alpha=30.0):
    X = jax.random.normal(jax.random.key(seed), (4, 6))
    return importance_solve(X.T @ X, alpha=alpha)


def test_the_edit_is_its_formula_and_the_sides_matter():
    forget, retain = _soft(1), _soft(2)
    edited = suppress_subspace(PARAMS, SPEC, forget={"fc": forget}, retain={"fc": retain})
    K = np.asarray(PARAMS["fc"]["kernel"])
    P_f, P_r = np.asarray(forget.dense()), np.asarray(retain.dense())
    expected = K - P_f @ (np.eye(6) - P_r) @ K
    swapped = K - (np.eye(6) - P_r) @ P_f @ K
    np.testing.assert_allclose(edited["fc"]["kernel"], expected, atol=1e-5)
    assert np.abs(swapped - expected).max() > 0.01
    np.testing.assert_array_equal(edited["fc"]["bias"], PARAMS["fc"]["bias"])
    np.testing.assert_array_equal(edited["norm"]["scale"], PARAMS["norm"]["scale"])


def test_in_double_precision_the_edit_is_its_formula_and_no_other(x64):
    """``W' = W Tᵀ`` with ``T = I - P_f (I - P_r)`` in torch's orientation; ``W T`` is another."""
    rng = np.random.default_rng(0)
    K = jnp.asarray(rng.normal(size=(6, 3)))
    rows = [jnp.asarray(rng.normal(size=(4, 6)) * np.arange(1, 7)) for _ in range(2)]
    P_f, P_r = (importance_solve(X.T @ X, alpha=30.0) for X in rows)
    edited = suppress_subspace({"fc": {"kernel": K}}, SPEC, forget={"fc": P_f}, retain={"fc": P_r})
    removed = np.asarray(P_f.dense()) @ (np.eye(6) - np.asarray(P_r.dense()))
    T, W = np.eye(6) - removed.T, np.asarray(K).T
    np.testing.assert_allclose(edited["fc"]["kernel"], (W @ T).T, atol=1e-12)
    assert np.linalg.norm(edited["fc"]["kernel"] - (W @ T.T).T) > 0.01


def test_on_flat_spectra_equal_spaces_stay_and_orthogonal_ones_go(x64):
    """Rank r: what is retained as well stays to r/α; what is not goes to r/α_f."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    X_f, X_r = basis[:, :2].T, basis[:, 2:5].T
    K = rng.normal(size=(6, 3))

    def edit(retain, alpha_r, alpha_f):
        P_r = importance_solve(jnp.asarray(retain.T @ retain), alpha=alpha_r)
        P_f = importance_solve(jnp.asarray(X_f.T @ X_f), alpha=alpha_f)
        params = {"fc": {"kernel": jnp.asarray(K)}}
        edited = suppress_subspace(params, SPEC, forget={"fc": P_f}, retain={"fc": P_r})
        return np.asarray(edited["fc"]["kernel"])

    same = edit(X_f, 1e8, 1e8)
    assert np.linalg.norm(same - K) <= 2 / 1e8 * np.linalg.norm(K) * 1.01
    other = edit(X_r, 100.0, 1e4)
    np.testing.assert_allclose(X_r @ other, X_r @ K, atol=1e-12)
    assert np.linalg.norm(X_f @ other) <= 2 / 1e4 * np.linalg.norm(X_f @ K)


def test_without_a_retain_space_the_whole_forget_space_goes():
    X = jax.random.normal(jax.random.key(1), (2, 6))
    hard = top_eigenspace(eigenbasis(X.T @ X), energy=0.9999)
    edited = suppress_subspace(PARAMS, SPEC, forget={"fc": hard})
    np.testing.assert_allclose(X @ edited["fc"]["kernel"], 0, atol=1e-5)
    assert np.abs(X @ PARAMS["fc"]["kernel"]).max() > 0.1


def test_what_the_retain_space_holds_is_not_touched():
    hard = top_eigenspace(eigenbasis(jnp.eye(6)), energy=1.0)
    edited = suppress_subspace(PARAMS, SPEC, forget={"fc": _soft(1)}, retain={"fc": hard})
    np.testing.assert_allclose(edited["fc"]["kernel"], PARAMS["fc"]["kernel"], atol=1e-6)


def test_an_edit_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"no retain projector for layers \['fc'\]"):
        suppress_subspace(PARAMS, SPEC, forget={"fc": _soft(1)}, retain={})
    with pytest.raises(ValueError, match=r"no LayerSpec for projectors of \['other'\]"):
        suppress_subspace(PARAMS, SPEC, forget={"other": _soft(1)})
    with pytest.raises(ValueError, match="have no 'fc/kernel'"):
        suppress_subspace({"norm": PARAMS["norm"]}, SPEC, forget={"fc": _soft(1)})
    small = importance_solve(jnp.eye(5), alpha=3.0)
    with pytest.raises(ValueError, match="projector of layer 'fc'"):
        suppress_subspace(PARAMS, SPEC, forget={"fc": small})


# --- golden: one linear layer, and convolutions of several geometries ----------------------------

SOLVERS = {
    "cholesky": lambda X, alpha: importance_solve(X.T @ X, alpha=alpha),
    "rows": lambda X, alpha: importance_solve_rows(X, alpha=alpha),
    "eigh": lambda X, alpha: importance(eigenbasis(X.T @ X), alpha=alpha),
}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return np.dtype(request.param)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_linear_layer_gets_the_reference_codes_projections_and_weights(solver, dtype, golden):
    stored = np.load(golden / "deep_unlearning_linear.npz")
    X = {side: jnp.asarray(stored[f"X_{side}"], dtype) for side in "rf"}
    K = jnp.asarray(stored["W"].T, dtype)
    specs = {"fc": LayerSpec("fc", K.shape)}
    space = jax.jit(SOLVERS[solver])
    atol_P, atol_W = (3e-5, 5e-6) if dtype == np.float32 else (1e-6, 1e-6)
    spaces = {}
    for name in stored.files:
        side, found, alpha = name[2:3], name.startswith("P_"), name.rpartition("__a")[2]
        if found:
            spaces[side, alpha] = space(X[side], float(alpha))
            np.testing.assert_allclose(spaces[side, alpha].dense(), stored[name], atol=atol_P)
    pairs = [name for name in stored.files if name.startswith("W_new")]
    assert len(pairs) == 12
    for name in pairs:
        _, alpha_r, alpha_f = name.split("__")
        edited = suppress_subspace(
            {"fc": {"kernel": K}},
            specs,
            forget={"fc": spaces["f", alpha_f.removeprefix("af")]},
            retain={"fc": spaces["r", alpha_r.removeprefix("ar")]},
        )
        np.testing.assert_allclose(edited["fc"]["kernel"].T, stored[name], atol=atol_W)


@pytest.mark.parametrize("case", range(4))
def test_a_convolution_gets_the_reference_codes_gram_and_weights(case, dtype, golden):
    stored = np.load(golden / "deep_unlearning_conv.npz")
    kh, kw, *rest = (int(v) for v in stored[f"geometry__{case}"])
    strides, (pad_h, pad_w), dilation = (tuple(rest[i : i + 2]) for i in (0, 2, 4))
    W = stored[f"W__{case}"]  # [out, in, kh, kw]
    layer = nn.Conv(
        W.shape[0],
        (kh, kw),
        strides,
        padding=((pad_h, pad_h), (pad_w, pad_w)),
        kernel_dilation=dilation,
        use_bias=False,
        param_dtype=dtype,
    )
    variables = {"params": {"kernel": jnp.asarray(W.transpose(2, 3, 1, 0), dtype)}}
    x = {
        side: jnp.asarray(stored[f"x_{side}__{case}"].transpose(0, 2, 3, 1), dtype)
        for side in ("retain", "forget")
    }
    specs = describe_layers(layer.apply, variables, x["retain"])
    inputs_fn = layer_inputs(layer.apply, specs)
    grams = {
        side: accumulate_gram(
            inputs_fn, variables, [{"inputs": images, "mask": jnp.ones(len(images), bool)}]
        )[""].gram
        for side, images in x.items()
    }
    order = np.arange(specs[""].d_in).reshape(-1, kh, kw).transpose(1, 2, 0).ravel()
    in_flax_order = np.ix_(order, order)  # from (c, kh, kw) to (kh, kw, c)
    expected = stored[f"gram_r__{case}"][in_flax_order]
    scale, atol = np.abs(expected).max(), 1e-5 if dtype == np.float32 else 1e-6
    np.testing.assert_allclose(grams["retain"], expected, atol=1e-6 * scale)
    alphas = dict(zip(("retain", "forget"), stored[f"alphas__{case}"].tolist(), strict=True))
    spaces = {side: importance_solve(G, alpha=alphas[side]) for side, G in grams.items()}
    for side, space in spaces.items():
        expected = stored[f"P_{side[0]}__{case}"][in_flax_order]
        np.testing.assert_allclose(space.dense(), expected, atol=atol)
    edited = suppress_subspace(
        variables["params"], specs, forget={"": spaces["forget"]}, retain={"": spaces["retain"]}
    )
    expected = stored[f"W_new__{case}"].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(edited["kernel"], expected, atol=atol)
