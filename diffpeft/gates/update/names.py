"""Names of the attributes in which a layer holds the tensors of gates."""

LOG_ALPHAS = ("diffpruning_log_alpha", "diffpruning_group_log_alpha")
"""Parameters: log_alpha of the elements and of the groups."""
MOMENTS = ("diffpruning_exp_avg", "diffpruning_exp_avg_sq")
"""Buffers of the elements' gates, as `StoredGates` has them."""
GROUP_MOMENTS = ("diffpruning_group_exp_avg", "diffpruning_group_exp_avg_sq")
"""Buffers of the group gates."""
LOW_MEMORY_MOMENTS = (
    "diffpruning_exp_avg",
    "diffpruning_exp_avg_scale",
    "diffpruning_exp_avg_sq_rows",
    "diffpruning_exp_avg_sq_columns",
)
"""Buffers of a large parameter's gates in the low-memory mode, as `LowMemoryGates` has them."""
DIFF_MOMENTS = ("diffpruning_w_sq_rows", "diffpruning_w_sq_columns", "diffpruning_w_sq_weight")
"""Buffers of its dense diff, as `DiffMoments` has them."""
LOW_MEMORY_BUFFERS = (*LOW_MEMORY_MOMENTS[1:], *DIFF_MOMENTS)
"""Buffers that the low-memory mode alone has."""
GATING_BUFFERS = (*MOMENTS, *GROUP_MOMENTS, *LOW_MEMORY_BUFFERS)
