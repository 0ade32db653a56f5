"""Line plots as PNG files, the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def lines(x: np.ndarray, ys: Mapping[str, np.ndarray], x_label: str, y_label: str) -> bytes:
    """A PNG with one line for each name in `ys`, (N,) each over x (N,); y from 0 to 1."""
    content = io.BytesIO()
    with matplotlib.style.context("default"):  # whatever a matplotlibrc of this machine says
        figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        for name, y in ys.items():
            axes.plot(x, y, label=name)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, 1.02), xlim=(x[0], x[-1]))
        axes.grid(alpha=0.3)
        axes.legend()
        FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()
