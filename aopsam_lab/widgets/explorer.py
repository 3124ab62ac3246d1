"""`explore`: the state of the explorer, which its page (explorer.js) shows and sets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from matplotlib.figure import Figure
from segment_anything.modeling import Sam

from aopsam_lab.asf import AsfParams
from aopsam_lab.evaluator import evaluate
from aopsam_lab.files import write_atomically
from aopsam_lab.masks.drawing import label_image, mask_colours, matched_colours, png_bytes
from aopsam_lab.pipeline.methods import METHODS, method_named
from aopsam_lab.pipeline.run import DEFAULT_PARAMS, loaded_sam
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.show import plot_panels
from aopsam_lab.sam.zoo import spec_of
from aopsam_lab.widgets import packing
from aopsam_lab.widgets.annotations import EMPTY, read_annotations, state_of, with_image
from aopsam_lab.widgets.session import (
    Answer,
    Clicks,
    Session,
    same_prompt,
    some_masks,
    with_clicked,
)
from aopsam_lab.widgets.sources import Opened, Source, read_quietly, sources_of, uploaded

DEBOUNCE = 0.12  # seconds a slider must rest before decoding begins
NOTHING, PINNED = "nothing", "this setting, pinned"  # what may stand beside, apart from a method
LAYERS = {"image": 1.0, "masks": 0.8, "prompts": 1.0}  # the opacity of those that are seen at first
SLIDERS = {  # least, most, step, tooltip
    "smoothing": (0, 8, 0.1, "sigma of the Gaussian over the PCM, in cells of a 256-wide map"),
    "confidence": (0, 0.95, 0.01, "a peak counts above this"),
    "spacing": (1, 32, 1, "reach of a peak's window, in cells of a 256-wide map"),
    "elimination": (0.5, 2, 0.01, "a prompt is dropped above this many times a PEM's mean"),
}


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
        compare: what stands beside it: a name in METHODS, NOTHING or PINNED.
        source: which of the images, from 0.
        round: rounds of adaptive filtering shown; all of them by default.
        selected: row of `segmentation.prompts` that is clicked, -1 for none.
        layers: opacity from 0 to 1 of image, pcm, smoothed, pem, masks, ground_truth, prompts.
        manual: objects made by hand, each a list of (x, y, label): 1 for the object, 0 for the
            background, 2 and 3 for two corners of a box. (i, 0, 4) at the end chooses the candidate
            i, 0 for the smallest. Their prompts are the last rows of `segmentation.prompts`.
        labels: names of masks, by the counts of their COCO RLE.
        deleted: the counts of masks that were deleted.
        segmentation, compared: what is shown, masks of clicks among its own, and beside it.
        annotations: the masks of all images that were shown, as COCO; a name is a category.
        message: what the message line says.
    """

    _esm = packing.bundled()
    _css = packing.page_text("explorer.css")

    params = traitlets.Instance(AsfParams, ()).tag(
        sync=True,
        to_json=lambda params, _: asdict(params),
        from_json=lambda values, _: AsfParams(**values),
    )
    method = traitlets.Unicode("aop").tag(sync=True)
    compare = traitlets.Unicode(NOTHING).tag(sync=True)
    source = traitlets.Int(0).tag(sync=True)
    round = traitlets.Int(0).tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)
    layers = traitlets.Dict(LAYERS).tag(sync=True)
    manual: traitlets.List[Clicks] = traitlets.List().tag(sync=True)
    labels: traitlets.Dict[str, str] = traitlets.Dict().tag(sync=True)
    deleted: traitlets.List[str] = traitlets.List().tag(sync=True)
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
        self,
        sources: Sequence[Source],
        sam: str | Sam,
        shown: Segmentation | None,
        file: Path | None = None,
        **state: Any,
    ) -> None:
        self._sources, self._sam = list(sources), sam
        self._file, self.annotations = file, read_annotations(file) if file else EMPTY
        if sources and not state.get("manual"):
            state |= state_of(self.annotations, sources[0].name)
        self._opened: Opened | None = None
        self._session: Session | None = None
        self._answers: dict[str, Answer | None] = {}  # by side
        self._task: asyncio.Task | None = None
        self._worker = ThreadPoolExecutor(1)
        look = {
            "methods": {name: method.uses for name, method in METHODS.items()},
            "beside": [NOTHING, PINNED, *METHODS],
            "sliders": SLIDERS,
            "styles": packing.STYLES,
            "colours": packing.COLOURS,
        }
        super().__init__(names=[source.name for source in sources], look=look, **state)
        self.on_msg(self._on_message)
        self._open(shown=shown)

    # --- changes -----------------------------------------------------------------------------

    @traitlets.validate("method", "compare")
    def _is_known(self, proposal: dict) -> str:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "method" or value not in (NOTHING, PINNED):
            method_named(value)
        return value

    @traitlets.observe("params", "method", "compare")
    def _setting_changed(self, change: dict) -> None:
        if self._session is None:
            return
        if change["name"] == "compare":
            pinned = self._answers.get("left") if self.compare == PINNED else None
            self._publish(self._session, {"right": pinned})
        self._ask()

    @traitlets.observe("manual")
    def _manual_changed(self, change: dict) -> None:
        session, old, new = self._session, change["old"], change["new"]
        answer = self._answers.get("left")
        if session is None or answer is None:
            return
        with self._errors_in_message():
            if not all(map(session.ask, new)):
                self.manual = old
                self.message = "SAM found nothing there."
                return
            changed = [i for i, clicks in enumerate(new) if clicks not in old]
            if changed and len(new) == len(old):  # a mask that is refined keeps its name
                was, now = (session.ask(one[changed[-1]]) for one in (old, new))
                if was and now and (name := self.labels.get(was.rle["counts"].decode())):
                    self.labels = {**self.labels, now.rle["counts"].decode(): name}
            n = len(answer.segmentation.prompts)
            kept = self.selected if self.selected < n else -1
            self._publish(session, {}, n + changed[-1] if changed else kept)
            self.message = session.opened.note

    @traitlets.observe("labels", "deleted")
    def _edited(self, _: dict) -> None:
        if self._session is not None:
            with self._errors_in_message():
                self._publish(self._session, {})

    @traitlets.observe("selected")
    def _selected_changed(self, _: dict | None = None) -> None:
        seg, session, self.detail = self.segmentation, self._session, {}
        if seg is None or session is None or not 0 <= self.selected < len(seg.prompts):
            return
        with self._errors_in_message():
            by_hand = [None] * (len(seg.prompts) - len(self.manual)) + self.manual
            lines, masks, only = session.described(seg, self.selected, by_hand[self.selected])
            packed = packing.pack_masks([mask.rle for mask in masks])
            self.detail = dict(prompt=self.selected, masks=packed, lines=lines, only=only)

    @traitlets.observe("source")
    def _open(self, change: dict | None = None, shown: Segmentation | None = None) -> None:
        """Show the image `source`; its Segmentation may be known already."""
        self._cancel()
        self._opened, self._session, self._answers = None, None, {}
        with self.hold_sync():
            self.left, self.right, self.image, self.preview = {}, {}, {}, []
            self.segmentation, self.compared, self.selected = None, None, -1
            if change is not None:
                for name, value in state_of(self.annotations, self.names[self.source]).items():
                    setattr(self, name, value)
        if shown is not None:
            known = (self.method, self.params), shown, shown.seconds["total"], shown.n_decoded
            self._answers["left"] = Answer(*known)
        if self._sources:
            self._ask()

    # --- answers -----------------------------------------------------------------------------

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._task, self.busy = None, ""

    def _due(self) -> dict[str, tuple[str, AsfParams]]:
        """The settings that are not answered, by side."""
        known = {side: answer.setting for side, answer in self._answers.items() if answer}
        asked = {"left": (self.method, self.params), "right": (self.compare, self.params)}
        return {k: v for k, v in asked.items() if v[0] in METHODS and known.get(k) != v}

    def _ask(self) -> None:
        """Answer what is not answered: at once where Python asks, else when the slider rests."""
        self._cancel()
        self.preview = []
        if not self._property_lock:  # ipywidgets has it while it takes a change of the page
            with suppress(StopIteration):
                self._answer().send(None)  # it waits for nothing
            return
        with self._errors_in_message():
            loop = asyncio.get_running_loop()
            if self._session and self.segmentation is not None and "left" in self._due():
                self.preview = self._session.sample(self.method, self.params)
            self.busy = "decoding …" if self._due() else ""
            self._task = loop.create_task(self._answer(loop))

    async def _answer(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Read the image, load the model, decode: in the worker of a loop, or here without one.

        A newer setting cancels this task, and then the worker gives up.
        """
        task = self._task

        async def run(work: Callable, *args: Any) -> Any:
            return await loop.run_in_executor(self._worker, work, *args) if loop else work(*args)

        def say(done: int, total: int, masks: list[dict]) -> None:
            if self._task is task and (session := self._session):
                self.busy = f"{done} of {total} prompts …"
                if "left" not in self._answers:
                    colours = mask_colours(masks, session.colours)
                    self.left = packing.pack_growing(self.method, masks, colours)

        def progress(done: int, total: int, masks: list[dict]) -> None:
            if self._task is not task:
                raise CancelledError
            if loop:
                loop.call_soon_threadsafe(say, done, total, masks[:])

        with self._errors_in_message():
            if self._opened is None:
                self._opened = opened = await run(read_quietly, self._sources[self.source])
                image = await run(packing.pack_image, opened.image, opened.ground_truth)
                with self.hold_sync():
                    self.image, self.left = image, packing.pack_growing(self.method)
                    self.busy = "loading the model …"
            self.message = self._opened.note
            if loop:
                await asyncio.sleep(DEBOUNCE)
            if (session := self._session) is None:
                session = Session(self._opened, await run(loaded_sam, self._sam))
                self.busy = "encoding the photograph …"
                await run(session.encode)
                self._session = session
                self._publish(session, {})
            for side, setting in self._due().items():
                self._publish(session, {side: await run(session.run, *setting, progress)})
            self.busy = ""

    def _publish(
        self, session: Session, new: dict[str, Answer | None], selected: int | None = None
    ) -> None:
        """Take new answers by side, and which prompt is selected; the page gets what is known."""
        self._answers.update(new)
        answer, beside = self._answers.get("left"), self._answers.get("right")
        with self.hold_sync():
            self.call = self._call()
            if beside is None or self.compared is not beside.segmentation:
                self.compared = beside.segmentation if beside else None
                self.right = self._packed(session, beside, beside.segmentation) if beside else {}
            if answer is None:
                return
            clicked = [(one, mask) for one in self.manual if (mask := session.ask(one))]
            seg = with_clicked(answer.segmentation, clicked)
            if self.deleted:
                wanted = [mask["counts"].decode() not in self.deleted for mask in seg.masks]
                seg = some_masks(seg, wanted)
            if selected is None:
                selected = same_prompt(self.segmentation, self.selected, seg)
            packed = self._packed(session, answer, seg)
            is_at_end = self.round >= self.left.get("rounds", 0)
            self.round = packed["rounds"] if is_at_end else min(self.round, packed["rounds"])
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
        self.annotations = self._annotated(seg, self.annotations)
        if self._file is not None:
            write_atomically(self._file, json.dumps(self.annotations))

    def _annotated(self, seg: Segmentation, coco: dict) -> dict:
        """A COCO data set with the masks of the image that is shown."""
        state = {name: getattr(self, name) for name in ("manual", "labels", "deleted")}
        return with_image(coco, seg, self.names[self.source], self.labels, state)

    def _packed(self, session: Session, answer: Answer, seg: Segmentation) -> dict:
        new = f" ({answer.n_new} new)" if answer.n_new < seg.n_decoded else ""
        badge = f"{seg.n_decoded} decoded of {seg.n_sampled}{new} · {len(seg.masks)} masks"
        badge += f" · {answer.seconds:.2f} s"
        ground_truth = session.opened.ground_truth
        if ground_truth:
            badge += f" · mIoU {100 * evaluate(ground_truth, seg.masks).miou:.1f} %"
        smoothing = seg.params.get("smoothing", self.params.smoothing)
        colours = mask_colours(seg.masks, session.colours)
        return packing.pack_result(seg, smoothing, badge, colours)

    # --- files -------------------------------------------------------------------------------

    def _on_message(self, _: object, content: dict, buffers: Sequence[memoryview]) -> None:
        """Take what the page sends: clicks to preview, an upload, or `what` to export."""
        with self._errors_in_message():
            if "ping" in content:
                self.send(content)
            elif buffers:
                self._sources.append(uploaded(bytes(buffers[0]), content["name"], self.names))
                self.names = [source.name for source in self._sources]
                if content["is_first"]:
                    self.set_state({"source": len(self.names) - 1})  # as if the page chose it
                    self.send_state("source")
            elif (clicks := content.get("hover")) is not None:
                masks = self._session.predict(clicks, best_only=True) if self._session else ()
                self.send({"hover": clicks, "masks": packing.pack_masks([m.rle for m in masks])})
            elif (seg := self.segmentation) is not None:
                name = Path(self.names[self.source]).stem
                if content["what"] == "labels":
                    labels = label_image(seg.masks, seg.image.shape[:2])
                    self.send({"name": f"{name}_labels.png"}, [png_bytes(labels)])
                else:  # all masks, or the one with these counts
                    mask = content.get("mask", "").encode()
                    seg = some_masks(seg, [mask in (b"", one["counts"]) for one in seg.masks])
                    text = json.dumps(self._annotated(seg, EMPTY))
                    self.send({"name": f"{name}.json"}, [text.encode()])

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
        plot_panels(figure, self.segmentation, self.compared, self.selected)
        return figure

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
        """The widget, and a still image for where no kernel runs: GitHub, nbviewer, HTML."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        if self.segmentation is not None:
            data["image/png"] = base64.b64encode(self.to_figure()._repr_png_()).decode("ascii")
        return data, metadata

    def __repr__(self) -> str:
        return f"Explorer({self.segmentation or self.message!r})"


def explore(
    source: object = "photos",
    sam: str | Sam = "mobile_sam",
    method: str = "aop",
    params: AsfParams = DEFAULT_PARAMS,
    manual: Sequence[Clicks] = (),
    compare: str = NOTHING,
    annotations: str | os.PathLike | None = None,
) -> Explorer:
    """Open images in the explorer; the last line of a notebook's cell.

    What is wrong with an argument is said in the explorer's message line.

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
        annotations: a COCO file that `Explorer.annotations` are written to after each change. What
            it holds already is resumed: clicks, names and deletions of each image. None: nothing is
            written.
    """
    shown = source if isinstance(source, Segmentation) else None
    try:
        if shown is not None:
            params = replace(params, **shown.params)
            method = shown.method if shown.method in METHODS else method
        state = {"method": method, "params": params, "compare": compare, "manual": list(manual)}
        file = None if annotations is None else Path(annotations)
        return Explorer(sources_of(source), sam, shown, file, **state)
    except (ValueError, OSError) as error:
        return Explorer((), sam, None, message=str(error))
