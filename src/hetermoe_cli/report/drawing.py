"""Pictures without a display: figures of a given size and their bytes. matplotlib is imported when one is drawn."""

import io
from typing import Any

from hetermoe_cli.errors import UserError

_DOTS_PER_INCH = 150


def new_figure(width_inches: float, height_inches: float) -> Any:
    """An empty matplotlib figure. UserError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'hetermoe[plot]'") from error
    figure = Figure(figsize=(width_inches, height_inches), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def encoded(figure: Any, file_format: str) -> bytes:
    """The figure as png, svg or pdf."""
    result = io.BytesIO()
    figure.savefig(result, format=file_format)
    return result.getvalue()
