"""`explore`: the state of the explorer, which its page (explorer.js) shows and sets."""

from __future__ import annotations

import asyncio
import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from IPython.display import HTML, display
from matplotlib.figure import Figure
from segment_anything.modeling import Sam

from aopsam_lab.asf import AsfParams
from aopsam_lab.data.images import image_from_bytes
from aopsam_lab.evaluator import evaluate
from aopsam_lab.masks.drawing import mask_colours, matched_colours
from aopsam_lab.pipeline.methods import METHODS, TITLES, method_named
from aopsam_lab.pipeline.run import DEFAULT_PARAMS, loaded_sam
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.show import plot_panels, save
from aopsam_lab.pipeline.types import MaskParams
from aopsam_lab.sam.zoo import spec_of
from aopsam_lab.widgets import packing
from aopsam_lab.widgets.session import Answer, Clicks, Session, same_prompt, with_clicked
from aopsam_lab.widgets.sources import Source, noted, prepared, sources_of

DEBOUNCE = 0.12  # seconds a slider must rest before decoding begins
NOTHING, PINNED = "none", "this setting, pinned"  # what may stand beside, apart from a method
UPLOADED = "explorer.segmentation.image"  # Python for an image that only the explorer has
LAYERS = {"image": 1.0, "masks": 0.8}  # the opacity of those that are seen at first
CELLS = "in 256ths of the picture's longer side; beside it in pixels of the picture"
SLIDERS = {  # least, most, step, unit, tooltip; the page turns cells into pixels
    "smoothing": (0, 8, 0.1, "px", f"how far the confidence map is blurred (sigma), {CELLS}"),
    "confidence": (0, 0.95, 0.01, "", "only peaks of the map above this become prompts"),
    "spacing": (1, 32, 1, "px", f"the least distance between prompts, {CELLS}"),
    "elimination": (0.5, 2, 0.01, "× mean", "a prompt is dropped where a PEM exceeds this"),
}
STILL = """<p class="aop-still">The explorer as it was when this cell ran. To make it live, run the
cell again.</p>"""
HERE = Path(__file__).parent
WORKER = ThreadPoolExecutor(1)  # of all explorers, as a notebook keeps each that it ever showed


def bundled(names: Sequence[str] = ("pane", "stage", "side", "explorer")) -> str:
    """The page's ES modules as the single one that anywidget takes: without imports and exports."""
    text = "\n".join((HERE / f"{name}.js").read_text("utf-8") for name in names)
    return re.sub(r"^(import [^;]*;|export (?!default))", "", text, flags=re.MULTILINE)


class ShownFigure(Figure):
    """A figure that a notebook shows without pyplot, which nothing here imports."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=90)
        return stream.getvalue()


class Explorer(anywidget.AnyWidget):
    """The widget that `explore` makes. Its traits are the state, to read, set and observe.

    A setting made in Python is answered before the statement ends. One made in the page is answered
    in two steps: the prompts at once, the masks when the slider rests.

    Attributes:
        params, method: the setting; a method is a name in METHODS.
        quality: which masks are kept, of images opened from now on.
        compare: what stands beside it: a name in METHODS, NOTHING or PINNED.
        source: which of the images, from 0.
        round: rounds of adaptive filtering shown; all of them by default.
        selected: row of `segmentation.prompts` that is clicked, -1 for none.
        least_iou: masks of a lower predicted IoU are hidden, in the page and in what it saves.
        layers: opacity from 0 to 1 of image, pcm, smoothed, pem, masks, ground_truth, prompts,
            eliminated (the prompts that were); one that is not named is off.
        manual: objects clicked by hand, each a list of (x, y, 1 for the object or 0 for the
            background).
        segmentation, compared: what is shown, masks of clicks among its own, and beside it.
        message: what the message line says.
    """

    _esm = bundled()
    _css = (HERE / "explorer.css").read_text("utf-8")

    params = traitlets.Instance(AsfParams, ()).tag(
        sync=True,
        to_json=lambda params, _: asdict(params),
        from_json=lambda values, _: AsfParams(**values),
    )
    method = traitlets.Unicode("aop").tag(sync=True)
    quality = traitlets.Instance(MaskParams, ())
    compare = traitlets.Unicode(NOTHING).tag(sync=True)
    source = traitlets.Int(0).tag(sync=True)
    round = traitlets.Int(0).tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)
    least_iou = traitlets.Float(0.0).tag(sync=True)
    layers = traitlets.Dict(LAYERS).tag(sync=True)
    manual: traitlets.List[Clicks] = traitlets.List().tag(sync=True)
    segmentation = traitlets.Instance(Segmentation, allow_none=True)
    compared = traitlets.Instance(Segmentation, allow_none=True)
    message = traitlets.Unicode().tag(sync=True)

    # What the page shows of it, see packing.py.
    names: traitlets.List[str] = traitlets.List().tag(sync=True)
    look = traitlets.Dict().tag(sync=True)
    image = traitlets.Dict().tag(sync=True)
    left = traitlets.Dict().tag(sync=True)
    right = traitlets.Dict().tag(sync=True)
    matched = traitlets.Dict().tag(sync=True)  # colours of `ground_truth` and of `right`
    preview: traitlets.List[dict] = traitlets.List().tag(sync=True)
    detail = traitlets.Dict().tag(sync=True)
    busy = traitlets.Unicode().tag(sync=True)
    call = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, sources: Sequence[Source], sam: str | Sam, shown: Segmentation | None, **state: Any
    ) -> None:
        self._sources, self._sam = list(sources), sam
        self._session: Session | None = None
        self._answers: dict[str, Answer | None] = {}  # by side
        self._n_rounds = 0  # that the last answer had
        self._task: asyncio.Task | None = None
        look = {
            "methods": {name: method.uses for name, method in METHODS.items()},
            "titles": {name: TITLES.get(name, name) for name in METHODS},
            "beside": [NOTHING, PINNED, *METHODS],
            "params": asdict(DEFAULT_PARAMS),
            "sliders": SLIDERS,
            "styles": packing.STYLES,
            "colours": packing.COLOURS,
        }
        super().__init__(names=[source.name for source in sources], look=look, **state)
        self.on_msg(self._on_message)
        self._open(shown=shown)

    # --- changes -----------------------------------------------------------------------------

    def set_state(self, sync_data: dict) -> None:
        """Take a change of the page; the message line says where it does not fit."""
        try:
            super().set_state(sync_data)
        except Exception as error:  # of any type, as a page may send anything
            self.message = f"The page sent what does not fit: {' '.join(str(error).split())}"

    @traitlets.validate("method", "compare")
    def _is_known(self, proposal: dict) -> str:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "method" or value not in (NOTHING, PINNED):
            method_named(value)
        return value

    @traitlets.validate("manual", "source", "round", "selected")
    def _fits(self, proposal: dict) -> Any:
        value = proposal["value"]
        if proposal["trait"].name == "source" and not 0 <= value < max(1, len(self._sources)):
            raise ValueError(f"There is no image {value} of {len(self._sources)}.")
        for one in value if proposal["trait"].name == "manual" else ():
            if not len(one) or not np.isfinite(np.array(one, float).reshape(len(one), 3)).all():
                raise ValueError(f"Clicks are x, y and 1 or 0, not {one!r}.")
        return int(value) if isinstance(value, bool) else value  # a trait Int lets True pass

    @traitlets.observe("params", "method", "compare")
    def _setting_changed(self, change: dict) -> None:
        if self._session is None:
            return
        if change["name"] == "compare":
            pinned = self._answers.get("left") if self.compare == PINNED else None
            self._publish(self._session, {"right": pinned})
        self._ask(self._session)

    @traitlets.observe("manual")
    def _manual_changed(self, change: dict) -> None:
        if self._session is None:
            return
        with self._errors_in_message():
            if all(map(self._session.ask, self.manual)):
                self._publish(self._session, {})
                self.message = self._session.opened.note
            else:
                self.manual = change["old"]
                self.message = "SAM found nothing there."

    @traitlets.observe("selected")
    def _selected_changed(self, _: dict | None = None) -> None:
        seg, session, self.detail = self.segmentation, self._session, {}
        if seg is None or session is None or not 0 <= self.selected < len(seg.prompts):
            return
        with self._errors_in_message():
            masks = session.candidates(seg, self.selected)
            lines = [f"predicted IoU {m.score:.2f}, stability {m.stability:.2f}" for m in masks]
            if masks:
                lines[max(range(len(masks)), key=lambda i: masks[i].score)] += ", best"
            packed = packing.pack_masks([mask.rle for mask in masks])
            self.detail = {"prompt": self.selected, "masks": packed, "lines": lines}
            if seg.prompts["status"].iloc[self.selected] == "duplicate":
                self.detail |= packing.pack_winner(seg, masks)

    @traitlets.observe("source")
    def _open(self, change: dict | None = None, shown: Segmentation | None = None) -> None:
        """Show the image `source`; its Segmentation may be known already."""
        self._cancel()
        if self._session is not None:
            self._session.forget()
        self._session, self._answers = None, {}
        with self.hold_sync():
            self.left, self.right, self.image, self.preview = {}, {}, {}, []
            self.segmentation, self.compared, self.selected = None, None, -1
            if change is not None:
                self.manual = []
        if not self._sources:
            return
        with self._errors_in_message():
            opened = noted(self._sources[self.source].read)
            self._session = session = Session(opened, loaded_sam(self._sam), self.quality)
            self.image = packing.pack_image(opened.image, opened.ground_truth)
            if shown is not None:
                self._publish(session, {"left": Answer((self.method, self.params), shown)})
            self._ask(session)

    def close(self) -> None:
        """Take the explorer off the page, and free the memory of what it shows."""
        super().close()
        self._sources = []
        self._open()

    # --- answers -----------------------------------------------------------------------------

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._task, self.busy = None, ""

    def _ask(self, session: Session) -> None:
        """Answer what is not answered: at once where Python asks, else when the slider rests."""
        self._cancel()
        self.message, self.preview = session.opened.note, []
        known = {side: answer.setting for side, answer in self._answers.items() if answer}
        due = {
            side: (name, self.params)
            for side, name in (("left", self.method), ("right", self.compare))
            if name in METHODS and known.get(side) != (name, self.params)
        }
        with self._errors_in_message():
            if not self._property_lock:  # ipywidgets has it while it takes a change of the page
                for side, setting in due.items():
                    self._publish(session, {side: session.run(*setting)})
            elif due:
                if self.segmentation is not None and "left" in due:
                    self.preview = session.sample(*due["left"])
                self.busy = "decoding …"
                self._task = asyncio.get_running_loop().create_task(self._later(session, due))

    async def _later(self, session: Session, due: dict[str, tuple[str, AsfParams]]) -> None:
        """Answer in the worker. A newer setting cancels this task, and then the worker gives up."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def say(done: int, total: int) -> None:
            if self._task is task:
                self.busy = f"decoding {done} of {total} …"

        def progress(done: int, total: int) -> None:
            if self._task is not task:
                raise CancelledError
            loop.call_soon_threadsafe(say, done, total)

        await asyncio.sleep(DEBOUNCE)
        with self._errors_in_message():
            for side, setting in due.items():
                found = loop.run_in_executor(WORKER, session.run, *setting, progress)
                self._publish(session, {side: await found})
            self.busy = ""

    def _publish(self, session: Session, new: dict[str, Answer | None]) -> None:
        """Take new answers by side; traits and page get what is known."""
        self._answers.update(new)
        answer, beside = self._answers.get("left"), self._answers.get("right")
        with self.hold_sync():
            self.call = self._call()
            if beside is None or self.compared is not beside.segmentation:
                self.compared = beside.segmentation if beside else None
                self.right = self._packed(session, beside.segmentation) if beside else {}
            if answer is None:
                return
            clicked = [(one, mask) for one in self.manual if (mask := session.ask(one))]
            seg = with_clicked(answer.segmentation, clicked)
            selected = same_prompt(self.segmentation, self.selected, seg)
            packed = self._packed(session, seg)
            is_at_end, self._n_rounds = self.round >= self._n_rounds, packed["rounds"]
            self.round = self._n_rounds if is_at_end else min(self.round, self._n_rounds)
            others = {"ground_truth": session.opened.ground_truth}
            others["right"] = self.compared.masks if self.compared else ()
            own = mask_colours(seg.masks, session.colours)
            self.matched = {
                name: matched_colours(masks, seg.masks, own).tolist()
                for name, masks in others.items()
            }
            self.left, self.preview, self.segmentation = packed, [], seg
            if selected == self.selected:
                self._selected_changed()
            self.selected = selected

    def _packed(self, session: Session, seg: Segmentation) -> dict:
        badge = f"{seg.n_decoded} decoded of {seg.n_sampled} prompts · {len(seg.masks)} masks"
        ground_truth = session.opened.ground_truth
        if ground_truth:
            badge += f" · mIoU {100 * evaluate(ground_truth, seg.masks).miou:.1f} %"
        smoothing = seg.params.get("smoothing", self.params.smoothing)
        colours = mask_colours(seg.masks, session.colours)
        return packing.pack_result(seg, smoothing, badge, colours)

    # --- files -------------------------------------------------------------------------------

    def _on_message(self, _: object, content: dict, buffers: Sequence[memoryview]) -> None:
        """Take what the page sends: an upload and its `name`, or `what` a view exports."""
        with self._errors_in_message():
            given = content if isinstance(content, dict) else {}
            if buffers:
                name, self.message = str(given.get("name", "image")), ""
                opened = noted(lambda: prepared(image_from_bytes(bytes(buffers[0]), name)))
                self._sources.append(Source(name, UPLOADED, lambda: opened))
                self.names = [*self.names, name]
                self.source = len(self._sources) - 1
            elif self.segmentation is not None:
                name, seg = self._sources[self.source].name, self._shown(self.segmentation)
                with tempfile.TemporaryDirectory() as folder:
                    files = save(seg, folder, Path(name).stem, name)
                    file = files.get(str(given.get("what")))
                    if file is None:
                        raise ValueError(f"What can be saved is {', '.join(files)}.")
                    reply = {"name": file.name, "view": given.get("view")}
                    self.send(reply, [file.read_bytes()])

    def _shown(self, seg: Segmentation) -> Segmentation:
        """A Segmentation without the masks that are hidden."""
        rows = np.flatnonzero(seg.scores >= self.least_iou)
        names = ("scores", "stability", "boxes", "mask_prompt")
        fields = {name: getattr(seg, name)[rows] for name in names}
        return replace(seg, masks=[seg.masks[i] for i in rows], **fields)

    def _call(self) -> str:
        """The Python that makes this state again."""
        sam = self._sam if isinstance(self._sam, str) else spec_of(self._sam).name
        call = f"aop.explore({self._sources[self.source].code}, sam={sam!r}"
        call += f", method={self.method!r}, params=aop.{self.params}"
        if self.manual:
            clicks = [[(round(x, 1), round(y, 1), k) for x, y, k in one] for one in self.manual]
            call += f", manual={clicks}"
        if self.compare in METHODS:
            call += f", compare={self.compare!r}"
        for name, value in asdict(self.quality).items():
            call += f", {name}={value}" if value != getattr(MaskParams, name) else ""
        return call + ")"

    @contextmanager
    def _errors_in_message(self) -> Iterator[None]:
        """Write errors into the message line, so that a user of the page sees no traceback."""
        try:
            yield
        except Exception as error:
            known = isinstance(error, (ValueError, OSError, ImportError))
            self.message = str(error) if known else f"{type(error).__name__}: {error}"
            self.busy = ""

    def to_figure(self) -> ShownFigure:
        """The state as a figure for a paper. Raises ValueError where nothing is shown."""
        if self.segmentation is None:
            raise ValueError("There is no image to draw: " + (self.message or "nothing is open."))
        figure = ShownFigure(layout="constrained")
        plot_panels(figure, self._shown(self.segmentation), self.compared, self.selected)
        return figure

    def _ipython_display_(self) -> None:
        """Show the widget; below it, where no kernel runs, a still image and how to make it live.

        The still image is an output of its own, as JupyterLab would prefer the widget to it.
        explorer.css hides both while the widget lives.
        """
        data, metadata = self._repr_mimebundle_() or ({}, {})
        display(data, metadata=metadata, raw=True)
        if self.segmentation is not None:
            display(HTML(STILL))
            display(self.to_figure())

    def __repr__(self) -> str:
        return f"Explorer({self.segmentation or self.message!r})"


def explore(
    source: object = "photos",
    sam: str | Sam = "mobile_sam",
    method: str = "aop",
    params: AsfParams = DEFAULT_PARAMS,
    manual: Sequence[Clicks] = (),
    compare: str = NOTHING,
    **quality: float | None,
) -> Explorer:
    """Open images in the explorer; the last line of a notebook's cell.

    Args:
        source: an array, a Pillow image, a path, a folder, a COCO-style folder, "photos" (those
            in the box; a folder of that name is "./photos"), a Sample, a data set, a list of them
            or a dictionary from names to them. Or a Segmentation, which is shown as it is, with
            its own method and params.
        sam: a name for `load_sam`, or a `Sam`.
        method: to begin with, as `params` and `compare`.
        params: the four parameters.
        manual: clicks by hand on the first image.
        compare: a method to show beside it.
        **quality: fields of MaskParams; points to a side and crops are those of grids.

    Raises:
        ValueError, OSError: there is no image in the source, or a name is not known. An image that
            cannot be read among others is said in the explorer's message line.
    """
    shown, sources = source if isinstance(source, Segmentation) else None, sources_of(source)
    if shown is not None:
        params = replace(params, **shown.params)
        quality = asdict(shown.quality) | quality
        method = shown.method if shown.method in METHODS else method
    elif len(sources) == 1:
        sources[0].read()  # or it raises
    state = {"method": method, "params": params, "compare": compare, "manual": list(manual)}
    state["quality"] = MaskParams(**quality)  # type: ignore[arg-type]
    return Explorer(sources, sam, shown, **state)
