"""The explorer's page in a real browser without a kernel: what it draws, asks and says."""

import base64

import numpy as np
import pytest

from aopsam_lab.asf import AsfParams
from aopsam_lab.masks import drawing
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.widgets import packing
from aopsam_lab.widgets.explorer import LAYERS, SLIDERS
from aopsam_lab.widgets.packing import bundled

MODEL = """
window.state = ([state, image]) => {
  const data = new DataView(Uint8Array.from(atob(image), (one) => one.charCodeAt(0)).buffer);
  const heard = {}, sent = [], values = { ...state, image: { ...state.image, data } };
  const fire = (name, ...rest) => (heard[name] ?? []).forEach((act) => act(...rest));
  const model = {
    sent, fire, get: (name) => values[name], save_changes() { sent.push({ ...values }); },
    set(name, value) { values[name] = value; fire(`change:${name}`); fire("change"); },
    send(content) { sent.push(content); }, on(name, act) { (heard[name] ??= []).push(act); },
  };
  explorer.render({ model, el: document.body });
  window.model = model;
};
"""


@pytest.fixture
def alone(browser):
    """The page with 20 masks in columns, and a model that remembers what it was sent."""
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    image, masks = np.zeros((100, 200, 3), np.uint8), np.zeros((20, 100, 200), bool)
    for i, mask in enumerate(masks):
        mask[:, 10 * i : 10 * i + 10] = True
    nothing = dict.fromkeys(["confidence", "pem", "x0", "y0", "x1", "y1"])
    row = {"y": 95, "round": 0, "status": 0, "decided": 0, "by": -1, **nothing}
    left = {
        "title": "aop", "setting": "", "badge": "", "rounds": 1, "maps": {}, "references": [],
        "masks": packing.pack_masks(encode_rle(masks), range(20)), "scores": [0.9] * 20,
        "prompts": [{"x": 10 * i + 5, **row} for i in range(20)],
    }  # fmt: skip
    packed = packing.pack_image(image)
    data = base64.b64encode(packed.pop("data")).decode()
    look = {"methods": {"aop": []}, "beside": ["nothing"], "sliders": SLIDERS}
    look |= {"styles": packing.STYLES, "colours": packing.COLOURS}
    state = {"look": look, "image": packed, "left": left, "right": {}, "names": ["a"], "source": 0}
    state |= {"params": vars(AsfParams()), "method": "aop", "compare": "nothing", "round": 1}
    state |= {"selected": -1, "layers": LAYERS, "manual": [], "message": "", "matched": {}}
    state |= {"preview": [], "detail": {}, "busy": "", "call": "", "labels": {}, "deleted": []}
    script = bundled().replace("export default", "const explorer =") + MODEL
    page.add_script_tag(content=script, type="module")
    page.wait_for_function("() => 'state' in window")
    page.evaluate("state", [state, data])
    page.wait_for_function("document.querySelector('.aop-badge')")
    yield page
    page.close()


def test_one_preview_is_asked_for_at_a_time_and_stale_ones_are_dropped(alone):
    box = alone.locator(".aop-canvas").bounding_box()
    for x in range(100, 300, 20):
        alone.mouse.move(box["x"] + x, box["y"] + 60)
    sent = alone.evaluate("model.sent")
    assert [list(content) for content in sent] == [["hover"]]
    answer = {"hover": sent[0]["hover"], "masks": {}}
    alone.evaluate("answer => model.fire('msg:custom', answer, [])", answer)
    sent = alone.evaluate("model.sent")
    assert len(sent) == 2, "of nine positions that waited, the last"
    [[x, _, label]] = sent[1]["hover"]
    readout = alone.locator(".aop-readout").inner_text()
    assert label == 1 and f"x {x:.1f}" in readout


def test_the_page_draws_the_label_image_that_python_draws(browser):
    page, rng = browser.new_page(), np.random.default_rng(0)
    script = bundled(["pane"]) + "Object.assign(window, { unpackMasks, topMask });"
    page.add_script_tag(content=script, type="module")
    page.wait_for_function("() => 'topMask' in window")
    for height, width, n in ((1, 1, 1), (5, 9, 3), (40, 31, 12), (64, 64, 40)):
        drawn = rng.random((n, height, width)) < 0.5  # every other one is noise
        for mask in drawn[::2]:
            mask[:] = False
            mask[: rng.integers(1, height + 1), rng.integers(0, width) :] = True
        masks = encode_rle(drawn)
        labels = page.evaluate(
            """([pack, width, height]) =>
              Array.from(topMask(unpackMasks(pack), { width, height }))""",
            [packing.pack_masks(masks), width, height],
        )
        labels = np.reshape(labels, (width, height)).T
        assert np.array_equal(labels, drawing.label_image(masks, (height, width)))
    page.close()


def test_what_waits_for_the_kernel_is_signed_after_a_while(alone):
    assert alone.locator(".aop-busy").is_hidden()
    alone.get_by_label("Method").dispatch_event("change")
    assert alone.locator(".aop-busy").is_hidden(), "not at once"
    alone.wait_for_function("!document.querySelector('.aop-busy').hidden", timeout=2000)
    assert alone.locator(".aop-busy").inner_text() == "waiting for the kernel …"
    ping = alone.evaluate("model.sent.at(-1)")
    alone.evaluate("ping => model.fire('msg:custom', ping, [])", ping)
    assert alone.locator(".aop-busy").is_hidden()


@pytest.mark.parametrize(
    ("event", "holder"), [("drop", "dataTransfer"), ("paste", "clipboardData")]
)
def test_several_files_are_dropped_or_pasted(alone, event, holder):
    alone.evaluate(
        """([event, holder]) => {
          const files = ["a.png", "b.png"].map((name) => new File(["x"], name));
          const act = new Event(event, { bubbles: true, cancelable: true });
          act[holder] = { files };
          document.querySelector(".aop-canvas").dispatchEvent(act);
        }""",
        [event, holder],
    )
    alone.wait_for_function("model.sent.filter(({ name }) => name).length === 2")
    files = [content for content in alone.evaluate("model.sent") if "name" in content]
    assert [(one["name"], one["is_first"]) for one in files] == [("a.png", True), ("b.png", False)]
