"""Colours, empty figures and figures with alternative text: what every plot here shares."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito (2008): distinguishable with every common colour vision deficiency.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#666666",
)


@dataclass
class Plot:
    """A figure and the text that describes it to readers who cannot see it.

    It displays itself in a notebook, alternative text included.
    """

    figure: Figure
    alt: str

    def png(self, dpi: int = 144, colours: int | None = None) -> bytes:
        """The figure as PNG; ``colours`` (64 suits a chart) makes it several times smaller."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=dpi)
        if colours is None:
            return buffer.getvalue()
        from PIL import Image

        small = io.BytesIO()
        Image.open(buffer).convert("RGB").quantize(colours).save(small, "png", optimize=True)
        return small.getvalue()

    def base64(self, dpi: int = 144, colours: int | None = None) -> str:
        return base64.b64encode(self.png(dpi, colours)).decode("ascii")

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        data = {"image/png": self.base64(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. It does without pyplot: no global state and no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def text_plot(text: str) -> Plot:
    """A figure that holds one sentence, where there is nothing to draw."""
    figure = new_figure(7, 1.2)
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return Plot(figure, text)


def tidy(axes: Any, title: str = "", x: str = "", y: str = "", grid: str = "y") -> None:
    """Label the axes and remove the lines that carry no data."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
