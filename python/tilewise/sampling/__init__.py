"""What the ops that draw tokens share, below them: options and their checks, formula, launch."""

from tilewise.sampling.formula import Ranked, adjusted, counts_of, filtered, noise_of, ranked
from tilewise.sampling.launch import (
    OPTIONS,
    as_floats,
    as_options,
    filters_inputs,
    rows_of,
)
from tilewise.sampling.options import (
    NUMBERS,
    check_logits,
    checked,
    refuse_bad_rows,
    refuse_gradient,
    refuse_nan,
    refuse_number,
)

__all__ = [
    "NUMBERS",
    "OPTIONS",
    "Ranked",
    "adjusted",
    "as_floats",
    "as_options",
    "check_logits",
    "checked",
    "counts_of",
    "filtered",
    "filters_inputs",
    "noise_of",
    "ranked",
    "refuse_bad_rows",
    "refuse_gradient",
    "refuse_nan",
    "refuse_number",
    "rows_of",
]
