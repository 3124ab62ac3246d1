"""The explorer's state as a matplotlib figure."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.widgets.packing import COLOUR_MAPS

PANEL = 3.6  # inches, of a square picture


class ShownFigure(Figure):
    """A figure that a notebook shows as a picture. Others it shows only once pyplot is imported, which nothing here needs."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=100)
        return stream.getvalue()


def state_figure(
    seg: Segmentation, compared: Segmentation | None = None, selected: int = -1
) -> Figure:
    """Masks and prompts, those of what it is compared with, then PCM and PEM where the method has them.

    The PEM is that of the selected prompt's mask where it is a reference, else the maximum. No backend is needed.
    """
    results = [seg] if compared is None else [seg, compared]
    maps = [] if seg.pcm is None else [("PCM", seg.pcm, COLOUR_MAPS[0])]
    if seg.pems is not None:
        rows = seg.references.index[seg.references["prompt"] == selected]
        one = int(rows[0]) if len(rows) else None
        maps.append(
            (
                "PEM, maximum" if one is None else f"PEM of prompt {selected}",
                seg.pem(one),
                COLOUR_MAPS[1],
            )
        )
    height, width = seg.image.shape[:2]
    across, down = PANEL * (width / height) ** 0.5, PANEL * (height / width) ** 0.5
    count = len(results) + len(maps)
    figure = ShownFigure(
        figsize=(across * count + 0.6 * len(maps), down + 0.5), layout="constrained"
    )
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for ax, result in zip(axes, results):
        result.plot(ax, legend=False)
    for ax, (title, values, colours) in zip(axes[len(results) :], maps):
        ends = [
            seg.model_size * side / scaled
            for side, scaled in zip((width, height), reversed(seg.input_size))
        ]
        ax.imshow(seg.image, extent=(0, width, height, 0))
        drawn = ax.imshow(
            values, cmap=colours, vmin=0, vmax=1, alpha=0.85, extent=(0, ends[0], ends[1], 0)
        )
        ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        ax.set_title(title, fontsize="small")
        figure.colorbar(drawn, ax=ax, shrink=0.7)
    return figure
