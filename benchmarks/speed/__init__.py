"""One module per question of speed; the names in the order of the table."""

QUESTIONS = (
    "gram_eigh",
    "gram_cholesky",
    "deep_unlearning_edit",
    "alpha_grid",
    "randomized_basis",
    "conv_gram",
    "conv_gradient",
    "confidence_svc",
    "projection_share",
    "two_processes",
    "unsc_projectors",
    "gram_rate",
    "scaling",
)
