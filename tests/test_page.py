"""The explorer's page in a real browser with a real result, and no kernel; see test_browser.py."""

import base64
import re
from dataclasses import replace

import pytest
from test_browser import CHROMIUM, FLAGS, SHOTS

import aopsam_lab as aop
from aopsam_lab.asf import AsfParams
from aopsam_lab.data import open_dataset
from aopsam_lab.widgets.explorer import HERE, Explorer, bundled

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

EAGER = AsfParams(spacing=16, confidence=0.1, elimination=1.1)  # few prompts, some eliminated
# a model with the state of a real one, whose changes go nowhere
MODEL = """
  const unpacked = (value) => Array.isArray(value) ? value.map(unpacked)
    : value?.bytes !== undefined
      ? new DataView(Uint8Array.from(atob(value.bytes), (c) => c.charCodeAt(0)).buffer)
    : value instanceof Object
      ? Object.fromEntries(Object.entries(value).map(([key, one]) => [key, unpacked(one)]))
    : value;
  window.show = (packed) => {
    const state = unpacked(packed), heard = [];
    window.model = {
      get: (name) => state[name], save_changes() {},
      set(name, value) { state[name] = value; heard.forEach((listener) => listener()); },
      on(name, listener) { if (name === "change") heard.push(listener); },
    };
    document.body.replaceChildren();
    page.render({ model, el: document.body });
  };
  window.change = (name, value) => model.set(name, unpacked(value));
"""


def packed(value):
    """What the page gets, as JSON."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, dict):
        return {key: packed(one) for key, one in value.items()}
    return list(map(packed, value)) if isinstance(value, (list, tuple)) else value


def state_of(explorer: Explorer) -> dict:
    names = (name for name in explorer.keys if name not in ("layout", "comm"))
    return packed(explorer.get_state([name for name in names if name[0] != "_"]))


@pytest.fixture(scope="module")
def states(sample):
    """What the page gets in several states: another method beside, a duplicate, no prompt."""
    states, explorer = {}, aop.explore(sample, params=EAGER, compare="aop_no_af")
    states["two"] = state_of(explorer)
    table = explorer.segmentation.prompts
    explorer.selected = int((table["status"] == "duplicate").to_numpy().nonzero()[0][0])
    states["duplicate"] = state_of(explorer)
    explorer.params = replace(EAGER, confidence=0.95)
    states["empty"] = state_of(explorer)
    return states


@pytest.fixture(scope="module")
def page():
    from playwright.sync_api import sync_playwright

    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page, errors = browser.new_page(viewport={"width": 1400, "height": 1000}), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_content(f"<style>{(HERE / 'explorer.css').read_text()}</style>")
        script = bundled().replace("export default", "const page =") + MODEL
        page.add_script_tag(content=script, type="module")
        page.wait_for_function("() => 'show' in window")
        yield page
        browser.close()
        assert errors == []


def show(page, state: dict, width: int = 1400) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    page.evaluate("state => show(state)", state)
    page.wait_for_function("() => document.querySelector('.aop-badge')")


def pixels(page) -> str:
    """What the canvas shows, once it has been drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    return page.evaluate("document.querySelector('.aop-canvas').toDataURL()")


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def on(page) -> list[str]:
    """The layers that are seen."""
    rows = page.locator(".aop-layer:has(input:checked)")
    return [text.split("\n")[0] for text in rows.all_inner_texts()]


def test_presets_show_what_they_say_and_nothing_that_covers_it(page, states):
    show(page, states["two"])
    seen = {pixels(page)}
    assert on(page) == ["Image", "Masks"]
    press(page, "Where to click")
    waiting = page.locator(".aop-status", has_text="waiting").first.inner_text().split("\n")[1]
    assert on(page) == ["Image", "PCM", "Prompts"]
    assert int(waiting) == len(states["two"]["left"]["prompts"]), "each is a ring"
    seen.add(pixels(page))
    press(page, "Why it was dropped")
    assert on(page) == ["Image", "PEM", "Dropped"]
    assert page.locator(".aop-status", has_text="waiting").count() == 0
    seen.add(pixels(page))
    dropped = next(p for p in states["two"]["left"]["prompts"] if p["status"] == 1)
    place = page.evaluate(
        """([x, y]) => {
          const box = document.querySelector(".aop-canvas").getBoundingClientRect();
          const { width, height } = model.get("image"), half = (box.width - 8) / 2;
          const k = Math.min(half / width, box.height / height);
          return [(half - k * width) / 2 + k * x, (box.height - k * height) / 2 + k * y];
        }""",
        [dropped["x"], dropped["y"]],
    )
    page.locator(".aop-canvas").click(position=dict(zip("xy", place, strict=True)))
    page.locator(".aop-detail", has_text="explains it").wait_for()
    page.evaluate("change('selected', -1)")
    press(page, "What was found")
    seen.add(pixels(page))
    pressed = page.locator(".aop-presets button[aria-pressed=true]").all_inner_texts()
    assert len(seen) == 3 and pressed == ["What was found"]


def test_reset_brings_back_the_defaults(page, states):
    show(page, states["two"])
    press(page, "Where to click")
    press(page, "Reset")
    assert page.evaluate("model.get('params')") == vars(AsfParams()) and "Masks" in on(page)


def test_sliders_tell_pixels_of_the_picture_and_all_have_a_tooltip(page, states):
    show(page, states["two"])
    units = page.locator(".aop-sliders small").all_inner_texts()
    assert units == ["= 5.0 px", "", "= 40 px", "× mean"]  # 640 pixels wide: 2.5 a cell
    hints = page.evaluate(
        "[...document.querySelectorAll('.aop-layer, .aop-sliders label')].map((e) => e.title)"
    )
    assert len(hints) == 12 and all(hints)


@pytest.mark.parametrize(("width", "is_stacked"), [(1400, False), (600, True)])
def test_panes_lie_side_by_side_or_stacked_by_the_room(page, states, width, is_stacked):
    """In both panes the same place of the image is under the pointer."""
    show(page, states["two"], width)
    box = page.locator(".aop-canvas").bounding_box()
    one, two = (badge.bounding_box() for badge in page.locator(".aop-badge").all())
    assert (two["y"] > one["y"] + 200) == is_stacked == (box["height"] > box["width"])
    assert (two["x"] > one["x"] + 200) != is_stacked
    assert page.evaluate("document.body.scrollWidth") <= width, "nothing is cut off"
    middle = box["height"] / 2 - 11 if is_stacked else box["width"] / 2 - 4
    step = middle + 22 if is_stacked else middle + 8
    places = []
    for far in (0, step):
        across, down = (0, far) if is_stacked else (far, 0)
        page.locator(".aop-canvas").hover(position={"x": across + 150, "y": down + 150})
        words = page.locator(".aop-readout").inner_text()
        places.append([float(word) for word in re.findall(r"^x (\S+), y (\S+)", words)[0]])
    assert places[0] == pytest.approx(places[1], abs=1)  # pixels
    assert page.locator(".aop-statuses > b").all_inner_texts() == ["AoP-SAM", "AoP-SAM without AF"]
    page.screenshot(path=SHOTS / f"12_two_{width}.png", full_page=True)


def test_glyphs_are_smaller_in_a_smaller_pane(page, states):
    """Of the image they cover as much, however large it is."""
    shares = []
    for n_panes in (2, 1):
        show(page, states["two"])
        page.evaluate("change('layers', { prompts: 1, eliminated: 1 })")
        page.evaluate(f"model.set('right', {n_panes} > 1 ? model.get('left') : {{}})")
        pixels(page)  # it is drawn
        n = page.evaluate("""() => {
          const canvas = document.querySelector(".aop-canvas"), { width, height } = canvas;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
          return data.filter((value, i) => i % 4 === 3 && value).length;
        }""")
        shares.append(n / n_panes / page.locator(".aop-canvas").bounding_box()["height"] ** 2)
    assert shares[0] == pytest.approx(shares[1], rel=0.15)


def test_a_duplicate_names_the_mask_that_won(page, states):
    show(page, states["duplicate"])
    text = page.locator(".aop-detail").inner_text()
    found = re.search(r"Mask (\d+) of prompt (\d+) won, predicted IoU 0\.\d+: .* (\d\.\d+)\.", text)
    mask, prompt, iou = found.groups()
    left = states["duplicate"]["left"]
    assert left["masks"]["owners"][int(mask)] == int(prompt) and float(iou) >= 0.7


def test_an_empty_result_says_why(page, states):
    show(page, states["empty"])
    text = page.locator(".aop-badge").first.inner_text()
    assert re.search(r"highest confidence here is 0\.\d\d, the least asked for 0\.95", text)


def test_the_readout_forgets_the_image_before(page, states):
    show(page, states["two"])
    page.locator(".aop-canvas").hover(position={"x": 150, "y": 150})
    assert "PCM" in page.locator(".aop-readout").inner_text()
    page.evaluate("image => change('image', image)", states["two"]["image"])
    assert page.locator(".aop-readout").inner_text() == ""


def test_a_picture_for_the_readme(page):
    """`make picture` copies it: the first photograph of the notebook, its masks and rings."""
    show(page, state_of(aop.explore(open_dataset("photos")[18])), 1200)
    page.wait_for_timeout(500)
    page.locator(".aop").screenshot(path=SHOTS / "explorer.png")
    assert on(page) == ["Image", "Masks"] and "mIoU" in page.locator(".aop-badge").inner_text()
