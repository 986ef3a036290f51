"""Many pictures side by side: what they are, in which order, and one labelled sheet of them."""

from .plan import AUTO, COLUMNS, Arrangement, Axes, arrange, as_labels, parse_prompts, parse_seeds
from .sheet import draw_sheet, layout

__all__ = [
    "AUTO",
    "COLUMNS",
    "Arrangement",
    "Axes",
    "arrange",
    "as_labels",
    "draw_sheet",
    "layout",
    "parse_prompts",
    "parse_seeds",
]
