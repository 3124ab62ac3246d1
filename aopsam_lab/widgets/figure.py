"""The explorer's state as a matplotlib figure."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.widgets.packing import PCM_COLOURS, PEM_COLOURS, extent_of

PANEL = 3.6  # inches, of a square image


class ShownFigure(Figure):
    """A figure that a notebook shows without pyplot, which nothing here imports."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=90)
        return stream.getvalue()


def state_figure(
    seg: Segmentation, compared: Segmentation | None = None, selected: int = -1
) -> ShownFigure:
    """Masks and prompts, those of what it is compared with, then PCM and PEM where there are any.

    The PEM is that of the prompt `selected`, where its mask is a reference, else the maximum.
    """
    results = [seg] if compared is None else [seg, compared]
    maps = [] if seg.pcm is None else [("PCM", seg.pcm, PCM_COLOURS)]
    if seg.pems is not None:
        rows = seg.references.index[seg.references["prompt"] == selected].tolist()
        title = f"PEM of prompt {selected}" if rows else "PEM, maximum"
        maps.append((title, seg.pem(rows[0] if rows else None), PEM_COLOURS))
    height, width = seg.image.shape[:2]
    across, down = PANEL * (width / height) ** 0.5, PANEL * (height / width) ** 0.5
    count = len(results) + len(maps)
    size = (across * count + 0.6 * len(maps), down + 0.5)
    figure = ShownFigure(figsize=size, layout="constrained")
    axes = iter(figure.subplots(1, count, squeeze=False)[0])
    for result in results:
        result.plot(next(axes), legend=False)
    right, bottom = extent_of(seg)
    look = {"vmin": 0, "vmax": 1, "alpha": 0.85, "extent": (0, right, bottom, 0)}
    for ax, (title, values, colours) in zip(axes, maps, strict=True):
        ax.imshow(seg.image, extent=(0, width, height, 0))
        drawn = ax.imshow(values, cmap=colours, **look)
        ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        ax.set_title(title, fontsize="small")
        figure.colorbar(drawn, ax=ax, shrink=0.7)
    return figure
