"""``explore``: a picture, its PCM and PEM, and the fate of every prompt, to look at and to change by hand.

``Explorer`` puts controls around the picture in the page (canvas.py) and keeps the state. What a change needs of the kernel is
answered in two steps: where a new setting would prompt at once (the preview), the masks when the hand rests (DEBOUNCE),
computed in a worker thread that gives up as soon as a newer setting is there.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as ui
import traitlets
from PIL import Image
from segment_anything.modeling import Sam

from aopsam_lab.asf import AsfParams
from aopsam_lab.masks import drawing
from aopsam_lab.pipeline.methods import METHODS
from aopsam_lab.pipeline.run import loaded_model, loaded_sam
from aopsam_lab.pipeline.segmentation import Segmentation
from aopsam_lab.pipeline.show import STATUS_STYLES
from aopsam_lab.sam.zoo import spec_of
from aopsam_lab.widgets import packing
from aopsam_lab.widgets.canvas import LAYERS, Canvas
from aopsam_lab.widgets.controls import NOTHING, PINNED, Controls, numbered
from aopsam_lab.widgets.figure import state_figure
from aopsam_lab.widgets.session import Answer, Cancelled, Clicks, Session, same_prompt, with_manual
from aopsam_lab.widgets.sources import Picture, Source, sources_of, uploaded_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEBOUNCE = 0.12  # seconds a slider must rest before decoding begins


class Explorer(ui.VBox):
    """The widget that `explore` makes. Its state, all of it to read, set and observe:

    params:        AsfParams, the four sliders. method, compare: names in METHODS; compare may be NOTHING or PINNED.
    source:        which of the pictures, from 0.
    segmentation:  of the left picture, masks asked for by hand among its own; compared: of the right one, or None.
    selected:      row of `segmentation.prompts` that is clicked, -1 for none.
    round:         rounds of adaptive filtering shown; all of them by default.
    layers:        opacity from 0 to 1 of each of LAYERS, as Python sets it; the page keeps its own after that.
    manual:        clicks by hand: a list of objects, each a list of (x, y, 1 for the object or 0 for the background).
    message:       what the message line says.

    Settings made in Python are answered before the statement ends; those made in the page do not make it wait.
    """

    params = traitlets.Instance(AsfParams)
    method = traitlets.Unicode("aop")
    compare = traitlets.Unicode(NOTHING)
    source = traitlets.Int(0)
    segmentation = traitlets.Instance(Segmentation, allow_none=True)
    compared = traitlets.Instance(Segmentation, allow_none=True)
    selected = traitlets.Int(-1)
    round = traitlets.Int(0)
    layers = traitlets.Dict(LAYERS)
    manual = traitlets.List()
    message = traitlets.Unicode()

    def __init__(
        self,
        sources: Sequence[Source] = (),
        sam: str | Sam = "mobile_sam",
        method: str = "aop",
        params: AsfParams = AsfParams(),
        manual: Sequence[Clicks] = (),
        compare: str = NOTHING,
        shown: Segmentation | None = None,
    ):
        self._sources, self._sam, self._session = list(sources), sam, None
        self._answers: dict[str, Answer | None] = {"left": None, "right": None}
        self._masks_by_hand: list = []
        self._worker, self._ticket, self._timer = ThreadPoolExecutor(1), 0, None
        self._live = self._showing = (
            False  # a change comes from the page; the knobs are being set to what holds
        )
        fates = [list(style) for style in STATUS_STYLES.values()]
        look = {"tables": packing.colour_tables(), "fates": fates}
        self.canvas = Canvas(look=look, layers=dict(LAYERS))
        self._controls = Controls([source.name for source in self._sources], self.canvas)
        super().__init__(
            children=self._controls.rows(self.canvas), params=params, method=method, compare=compare
        )
        for trait in ("selected", "round", "layers", "message", "manual"):
            traitlets.link((self, trait), (self.canvas, trait))
        self._connect()
        self.canvas.on_msg(self._on_message)
        with self._said_not_raised():
            self._open(shown)
            if manual and self._session:
                self._set_manual([[tuple(click) for click in clicks] for clicks in manual])

    # --- controls --------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """The controls' values and this object's traits follow each other."""
        for control, trait in (
            (self._controls.picker, "source"),
            (self._controls.method, "method"),
            (self._controls.compare, "compare"),
        ):
            control.observe(
                lambda change, trait=trait: self._from_page(trait, change["new"]), "value"
            )
        for name, knob in self._controls.knobs.items():
            knob.observe(lambda change, name=name: self._knob_moved(name, change["new"]), "value")
        self._controls.upload.observe(self._uploaded, "value")

    def _from_page(self, trait: str, value) -> None:
        if value is not None and value != getattr(self, trait):
            self._live = True
            try:
                setattr(self, trait, value)
            finally:
                self._live = False

    def _knob_moved(self, name: str, value: float) -> None:
        if not self._showing:
            self._from_page(
                "params", replace(self.params, **{name: round(value, 6)})
            )  # the page adds steps up

    def _show_knobs(self) -> None:
        self._showing = True
        for name, knob in self._controls.knobs.items():
            value = getattr(self.params, name)
            knob.min, knob.max = (
                min(knob.min, value),
                max(knob.max, value),
            )  # Python may go beyond what a hand needs
            knob.value = value
        self._showing = False

    def _uploaded(self, change) -> None:
        if not change["new"]:
            return
        with self._said_not_raised():
            upload = change["new"][0]
            picture = uploaded_picture(bytes(upload["content"]), upload["name"])
            self._sources.append(Source(upload["name"], repr(upload["name"]), lambda: picture))
            self._controls.picker.options = numbered([source.name for source in self._sources])
            self.source = len(self._sources) - 1

    # --- state -> answers ------------------------------------------------------------------------------------------------

    @traitlets.observe("params")
    def _params_changed(self, _) -> None:
        if not self._live:  # a knob in the page has moved on already: it must not jump back
            self._show_knobs()
        if self._session is not None:
            self._ask_for(("left", "right") if self.compare in METHODS else ("left",), sampled=True)

    @traitlets.observe("method")
    def _method_changed(self, _) -> None:
        self._controls.method.value = self.method if self.method in METHODS else None
        uses = METHODS[self.method].uses if self.method in METHODS else ()
        for name, knob in self._controls.knobs.items():
            knob.disabled = name not in uses
        if self._session is not None:
            self._ask_for(("left",), sampled=True)

    @traitlets.observe("compare")
    def _compare_changed(self, _) -> None:
        if self.compare not in (NOTHING, PINNED, *METHODS):
            raise ValueError(
                f"compare must be {NOTHING!r}, {PINNED!r} or one of {', '.join(METHODS)}, not {self.compare!r}"
            )
        self._controls.compare.value = self.compare
        if self._session is None:
            return
        self._answers["right"] = self._answers["left"] if self.compare == PINNED else None
        self._publish("right")
        if self.compare in METHODS:
            self._ask_for(("right",))

    @traitlets.observe("source")
    def _source_changed(self, _) -> None:
        self._controls.picker.value = self.source
        with self._said_not_raised():
            self._open()

    @traitlets.observe("selected")
    def _selected_changed(self, _) -> None:
        if (
            self.selected < 0
            or self.segmentation is None
            or self.selected >= len(self.segmentation.prompts)
        ):
            self.canvas.detail = {}
            return
        with self._said_not_raised():
            masks = self._session.candidates(self.segmentation, self.selected)
            best = max((m.score for m in masks), default=0)
            self.canvas.detail = {
                "prompt": self.selected,
                "masks": packing.pack_masks([mask.rle for mask in masks]),
                "lines": [
                    f"IoU {mask.score:.2f}, stability {mask.stability:.2f}{', best' if mask.score == best else ''}"
                    for mask in masks
                ],
            }

    def _open(self, shown: Segmentation | None = None) -> None:
        """Show the picture `source`; its Segmentation may be known already."""
        self._ticket += 1
        self._session, self._answers, self._masks_by_hand = None, {"left": None, "right": None}, []
        with self.canvas.hold_sync():
            self.canvas.left, self.canvas.right, self.canvas.preview, self.canvas.picture = (
                {},
                {},
                {},
                {},
            )
            self.segmentation, self.compared, self.manual, self.selected = None, None, [], -1
        if not self._sources:
            return
        picture = self._sources[self.source].read()
        session = Session(picture, loaded_sam(self._sam), self._model)
        height, width = picture.image.shape[:2]
        packed = {"width": width, "height": height, **packing.pack_image(picture.image)}
        self.canvas.picture = packed | {
            "truth": packing.pack_masks(session.truth) if session.truth else {}
        }
        self.message, self._session = picture.note, session
        if shown is None:
            self._ask_for(("left", "right") if self.compare in METHODS else ("left",))
        else:
            answer = Answer(
                shown, shown.seconds.get("total", 0.0), shown.n_decoded, session.miou(shown)
            )
            self._received(self._ticket, "left", answer)

    def _model(self, kind: str):
        return loaded_model(kind, loaded_sam(self._sam))

    def _ask_for(self, sides: Sequence[str], sampled: bool = False) -> None:
        """Answers for these sides: now where Python asks, when the hand rests where the page does."""
        self._ticket += 1
        if self._timer is not None:
            self._timer.cancel()
        job = partial(
            self._compute,
            self._ticket,
            self._session,
            [(side, *self._setting(side)) for side in sides],
        )
        loop = _running_loop() if self._live else None
        with self._said_not_raised():
            if loop is None:
                job(lambda function, *args: function(*args))
                return
            if sampled:
                self.canvas.preview = packing.pack_waiting(
                    self._session.sample(self.method, self.params)
                )
            self.canvas.busy = "decoding …"
            self._timer = loop.call_later(
                DEBOUNCE, self._worker.submit, self._in_worker, job, loop.call_soon_threadsafe
            )

    def _setting(self, side: str) -> tuple[str, AsfParams]:
        return (self.method if side == "left" else self.compare), self.params

    def _compute(
        self,
        ticket: int,
        session: Session,
        wanted: list[tuple[str, str, AsfParams]],
        tell: Callable,
    ) -> None:
        """Run the settings one after the other; `tell` calls a function in the thread that owns the widget."""
        for side, method, params in wanted:
            progress = partial(tell, self._progress, ticket)
            answer = session.run(method, params, lambda: ticket != self._ticket, progress)
            tell(self._received, ticket, side, answer)
        tell(self._progress, ticket)

    def _in_worker(self, job: Callable, tell: Callable) -> None:
        try:
            job(tell)
        except Cancelled:
            pass
        except (
            Exception
        ) as error:  # nobody waits for this thread: a person reads it in the message line
            tell(self._failed, error)

    def _progress(self, ticket: int, done: int = 0, total: int = 0) -> None:
        if ticket == self._ticket:
            self.canvas.busy = f"decoding {done} of {total} …" if total else ""

    def _failed(self, error: Exception) -> None:
        with self._said_not_raised():
            raise error

    def _received(self, ticket: int, side: str, answer: Answer) -> None:
        if ticket == self._ticket:
            self._answers[side] = answer
            self.message = self._session.picture.note
            self._publish(side)

    def _publish(self, side: str) -> None:
        """Traits and page get what is known of one side."""
        answer = self._answers[side]
        seg = None if answer is None else answer.segmentation
        self.canvas.call = self._call()
        if side == "right":
            self.compared = seg
            self.canvas.right = {} if answer is None else self._packed(answer, seg)
            return
        seg = with_manual(seg, self._masks_by_hand)
        selected = same_prompt(self.segmentation, self.selected, seg)
        with self.canvas.hold_sync():
            packed = self._packed(answer, seg)
            rounds, at_end = packed["prompts"]["rounds"], self.round == self._controls.film.max
            self._controls.film.max = self._controls.play.max = rounds
            self.round = rounds if at_end else min(self.round, rounds)
            self.canvas.left, self.canvas.preview = packed, {}
            self.segmentation = seg
            if selected == self.selected:
                self._selected_changed(None)
            self.selected = selected

    def _packed(self, answer: Answer, seg: Segmentation) -> dict:
        truth = self._session.miou(seg)
        badge = [
            f"{seg.n_decoded} decoded of {seg.n_sampled}",
            f"{len(seg.masks)} masks",
            f"{answer.seconds:.2f} s",
        ]
        if answer.n_new < seg.n_decoded:
            badge[0] += f" ({answer.n_new} new)"
        if truth is not None:
            badge.append(f"mIoU {100 * truth:.1f} %")
        smoothed = (
            None
            if seg.pcm is None
            else self._session.smoothed(seg.pcm, replace(self.params, **seg.params))
        )
        return packing.pack_result(seg, smoothed, " · ".join(badge))

    # --- by hand, out ----------------------------------------------------------------------------------------------------

    def _on_message(self, _, content: dict, buffers) -> None:
        kind = content.get("kind")
        if self._session is None:
            return
        with self._said_not_raised():
            if kind == "ask":
                self.click(float(content["x"]), float(content["y"]), int(content["label"]))
            elif kind == "undo":
                self.undo()
            elif kind == "export" and self.segmentation is not None:
                self._send_file(content["what"])

    def click(self, x: float, y: float, label: int = 1) -> None:
        """Ask SAM at a point of the image: a new object, or, with label 0, background for the last one."""
        click = (x, y, label)
        if label:
            self._set_manual([*self.manual, [click]])
        elif self.manual:
            self._set_manual([*self.manual[:-1], [*self.manual[-1], click]])
        else:
            self.message = "A background point belongs to an object: click the object first, then shift-click what is not it."

    def undo(self) -> None:
        """Take back the last click."""
        if self.manual:
            rest = list(self.manual[-1])[:-1]
            self._set_manual([*self.manual[:-1], *([rest] if rest else [])])

    def _set_manual(self, manual: list) -> None:
        known = {json.dumps(clicks): mask for clicks, mask in self._masks_by_hand}
        made = []
        for clicks in manual:
            key = json.dumps(clicks)
            mask = known[key] if key in known else self._session.ask(clicks)
            if mask is None:
                self.message = "SAM found nothing there."
                return
            made.append((clicks, mask))
        self.manual, self._masks_by_hand, self.message = manual, made, self._session.picture.note
        if self._answers["left"] is not None:
            self._publish("left")

    def _send_file(self, what: str) -> None:
        stem = Path(self._sources[self.source].name).stem
        if what == "coco":
            name, mime = f"{stem}.json", "application/json"
            data = json.dumps(
                self.segmentation.to_coco(file_name=self._sources[self.source].name)
            ).encode()
        else:
            name, mime = f"{stem}_labels.png", "image/png"
            data = drawing.png_bytes(
                drawing.label_image(self.segmentation.masks, self.segmentation.image.shape[:2])
            )
        self.canvas.send({"kind": "file", "name": name, "mime": mime}, [data])

    def _call(self) -> str:
        """The Python that makes this state again."""
        sam = (
            repr(self._sam)
            if isinstance(self._sam, str)
            else f"aop.load_sam({spec_of(self._sam).name!r})"
        )
        values = ", ".join(
            f"{field.name}={getattr(self.params, field.name):g}" for field in fields(AsfParams)
        )
        arguments = [
            self._sources[self.source].code,
            f"sam={sam}",
            f"method={self.method!r}",
            f"params=aop.AsfParams({values})",
        ]
        if self.manual:
            clicks = [
                [(round(x, 1), round(y, 1), label) for x, y, label in clicks]
                for clicks in self.manual
            ]
            arguments.append(f"manual={clicks}")
        if self.compare in METHODS:
            arguments.append(f"compare={self.compare!r}")
        return f"aop.explore({', '.join(arguments)})"

    @contextmanager
    def _said_not_raised(self):
        """What goes wrong is said in the message line: a person at the widget never meets a stack trace or a dead panel."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", Image.DecompressionBombWarning
                )  # `prepared` has a note on large pictures
                yield
        except Exception as error:
            known = isinstance(error, (ValueError, OSError, ImportError))
            self.message = str(error) if known else f"{type(error).__name__}: {error}"
            self.canvas.busy = ""

    def to_figure(self) -> Figure:
        """The state as a matplotlib picture for a paper; see :func:`figure.state_figure`. Raises ValueError where nothing is
        shown."""
        if self.segmentation is None:
            raise ValueError("There is no picture to draw: " + (self.message or "nothing is open."))
        return state_figure(self.segmentation, self.compared, self.selected)

    def _repr_mimebundle_(self, **kwargs):
        """The widget, and a picture for where no kernel runs: GitHub, nbviewer, an HTML export."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if self.segmentation is not None:
            stream = io.BytesIO()
            self.to_figure().savefig(stream, format="png", dpi=80)
            data["image/png"] = base64.b64encode(stream.getvalue()).decode("ascii")
        data["text/plain"] = repr(self)
        return bundle

    def __repr__(self) -> str:
        return (
            f"Explorer({self.segmentation!r})"
            if self.segmentation is not None
            else f"Explorer({self.message!r})"
        )


def explore(
    pictures="photos",
    sam: str | Sam = "mobile_sam",
    method: str = "aop",
    params: AsfParams = AsfParams(),
    manual: Sequence[Clicks] = (),
    compare: str = NOTHING,
) -> Explorer:
    """Open pictures in the explorer; the last line of a notebook's cell.

    pictures: an array, a Pillow image, a path, a folder, a COCO-style folder, "photos" (those in
              the box; a folder of that name is "./photos"), a Segmentation, a Sample, a data set, a list of them or a
              dictionary from names to them.
    sam:      a name for `load_sam`, or a ``Sam``. method, params: where to begin. manual: clicks by hand on the first picture.
    compare:  a method to show beside it.
    What is wrong with any of them is said in the widget's message line.
    """
    if isinstance(pictures, Segmentation):  # shown as it is
        return explore_segmentation(pictures, sam)
    try:
        for name in [method] if compare == NOTHING else [method, compare]:
            if name not in METHODS:
                raise ValueError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}")
        return Explorer(sources_of(pictures), sam, method, params, manual, compare)
    except (ValueError, OSError) as error:
        explorer = Explorer()
        explorer.message = str(error)
        return explorer


def explore_segmentation(seg: Segmentation, sam: str | Sam = "mobile_sam") -> Explorer:
    """The explorer on a Segmentation as it is; SAM is asked only when something changes."""
    known = {
        field.name: seg.params[field.name]
        for field in fields(AsfParams)
        if field.name in seg.params
    }
    source = Source("picture", "seg.image", lambda: Picture(seg.image))
    return Explorer(
        [source], sam, seg.method if seg.method in METHODS else "aop", AsfParams(**known), shown=seg
    )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
