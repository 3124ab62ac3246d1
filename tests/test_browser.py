"""The explorer in a real browser, Chromium on a local JupyterLab; screenshots: build/browser/."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from aopsam_lab.asf import ROUNDS
from aopsam_lab.data import open_dataset
from aopsam_lab.masks import drawing
from aopsam_lab.masks.rle import encode_rle
from aopsam_lab.widgets import packing
from aopsam_lab.widgets.explorer import bundled

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "explore_pcm_pem.ipynb"
SHOTS = ROOT / "build" / "browser"
NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SIDE = 224  # of the image in the notebook, pixels
PATIENCE = 180_000  # ms: a busy machine is slow, not broken
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def command_of(target: str) -> list[str]:
    """What `make` runs for a target, after Python's own name."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    return shlex.split(done.stdout.splitlines()[-1])[2:]


@contextmanager
def served(folder: Path, path: str, *command: str):
    """Start a local server with settings of its own, wait until it answers; its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    env = os.environ | {name: str(folder / "settings") for name in own}
    command = [sys.executable, "-m", *command, "--no-browser", f"--port={port}"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE / 1000
    try:
        while True:
            try:
                urllib.request.urlopen(address + path, timeout=PATIENCE / 1000).close()
                break
            except OSError:
                is_running = process.poll() is None and time.monotonic() < end
                assert is_running, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def notebook_in(folder: Path) -> Path:
    """The notebook itself with few prompts, so that two busy cores are enough."""
    folder.mkdir(exist_ok=True)
    image = Image.fromarray(open_dataset("photos")[6].image)
    image.crop((0, 0, image.height, image.height)).resize((SIDE, SIDE)).save(folder / "own.png")
    notebook = nbformat.read(NOTEBOOK, 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += "\nshown, folder = [6], 'own.png'"
    cell.source += "\nconfidence, spacing, elimination = 0.1, 16, 1.1"
    path = folder / NOTEBOOK.name
    nbformat.write(notebook, path)
    return path


class Page:
    """JupyterLab with the notebook run: what a person would do there, and what they would see."""

    def __init__(self, page):
        self.page, self.sent, self.got, self.errors = page, [], [], []
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("websocket", self._listen)
        self.canvas = page.locator(".aop-canvas")

    def _listen(self, socket) -> None:
        socket.on("framesent", lambda frame: self.sent.append(frame))
        socket.on("framereceived", lambda frame: self.got.append(len(frame)))

    def text(self, part: str) -> str:
        return self.page.locator(f".aop-{part}").first.inner_text()

    def numbers(self) -> tuple[int, ...]:
        """Of "aop 35 decoded of 47 (0 new) ..." the numbers 35 and 47."""
        return tuple(map(int, re.search(r"(\d+) decoded of (\d+)", self.text("badge")).groups()))

    def pixels(self) -> str:
        """What the canvas shows, once it has been drawn."""
        frame = "requestAnimationFrame"
        self.page.evaluate(f"() => new Promise((done) => {frame}(() => {frame}(done)))")
        return self.page.evaluate("document.querySelector('.aop-canvas').toDataURL()")

    def until(self, condition: str, argument=None) -> None:
        self.page.wait_for_function(condition, arg=argument)

    def says(self, part: str, text: str) -> None:
        """Until a part of the page does."""
        condition = "([part, text]) => document.querySelector(part)?.innerText.includes(text)"
        self.until(condition, [f".aop-{part}", text])

    def opacity(self, layer: str, percent: int) -> None:
        self.page.get_by_label(f"opacity of {layer}", exact=True).fill(str(percent))

    def place(self, x: float, y: float) -> dict[str, float]:
        """A point of the square image, shown whole -> the point on the canvas."""
        box = self.canvas.bounding_box()
        k = min(box["width"], box["height"]) / SIDE
        left, top = ((box[side] - k * SIDE) / 2 for side in ("width", "height"))
        return {"x": left + k * x, "y": top + k * y}

    def press(self, *keys: str, part=None) -> None:
        """Press keys on a part of the page, None: the canvas."""
        (part or self.canvas).focus()
        for key in keys:
            self.page.keyboard.press(key)

    def settled(self) -> None:
        """Until no answer is under way."""
        self.page.wait_for_timeout(250)
        self.until("document.querySelector('.aop-busy').hidden")

    def shot(self, name: str) -> None:
        self.page.screenshot(path=SHOTS / f"{name}.png")


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """The notebook, opened in JupyterLab and run by its menu."""
    folder = tmp_path_factory.mktemp("lab")
    path = notebook_in(folder / "notebooks").relative_to(folder)
    command = *command_of("lab"), "--allow-root", "--IdentityProvider.token="
    with served(folder, "/api", *command) as address:
        context = browser.new_context(viewport={"width": 1440, "height": 1000})
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
        lab = Page(context.new_page())
        lab.page.goto(f"{address}/lab/tree/{path}?reset")  # the folder above is in reach
        lab.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        lab.page.add_style_tag(content=".Toastify { display: none }")  # the offer of news
        # "idle" may be said before the kernel listens
        while not any("execute_request" in str(frame) for frame in lab.sent):
            lab.page.get_by_role("menuitem", name="Run", exact=True).click()
            lab.page.get_by_text("Run All Cells", exact=True).click()
            lab.page.wait_for_timeout(2000)
        lab.page.locator("pre", has_text="Loading the models, about 15 s").wait_for()
        lab.shot("0_loading")
        lab.says("badge", "masks")
        lab.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        lab.page.wait_for_timeout(1000)
        lab.shot("1_run_all")
        lab.box_after_run_all = lab.canvas.bounding_box()
        lab.page.keyboard.press("Control+b")  # the file list gives its room to the image
        output = lab.page.locator(".jp-OutputArea-output:has(.aop)")
        output.evaluate("element => element.scrollIntoView()")
        yield lab
        context.close()


def test_the_notebook_runs_and_shows_the_image(lab):
    lab.shot("1_opened")
    assert lab.errors == [] and lab.text("message") == ""
    box = lab.box_after_run_all  # the notebook ends with the image in view
    assert 0 < box["y"] and box["y"] + box["height"] < 1000
    assert lab.page.locator("pre", has_text="Loading the models").count() == 0
    assert lab.page.locator(".jp-RenderedText[data-mime-type*=stderr]").count() == 0
    counts = dict(line.split("\n") for line in lab.page.locator(".aop-status").all_inner_texts())
    decoded, total = lab.numbers()
    assert sum(map(int, counts.values())) == total
    assert int(counts["eliminated, never decoded"]) == total - decoded


def test_each_slider_changes_the_image_and_the_badge(lab):
    for name, n in {"elimination": 90, "smoothing": 8, "confidence": 40, "spacing": 8}.items():
        for key in ("ArrowRight", "ArrowLeft"):
            badge, pixels = lab.text("badge"), lab.pixels()
            lab.press(*n * [key], part=lab.page.get_by_label(name, exact=True))
            lab.until("old => document.querySelector('.aop-badge').innerText !== old", badge)
            lab.settled()
            assert lab.pixels() != pixels, name
            lab.shot(f"2_slider_{name}_{key}")


def test_layers_need_nothing_from_the_kernel(lab):
    """Opacity, hover, zoom and pan change the image, and no byte goes either way."""
    lab.settled()
    lab.page.wait_for_timeout(500)
    sent, got = len(lab.sent), len(lab.got)
    here, middle = lab.place(70, 90), lab.place(112, 112)
    seen = {lab.pixels()}
    for name in ("PCM", "PEM", "Masks"):
        lab.opacity(name, 60)
        seen.add(lab.pixels())
        lab.shot(f"3_layer_{name}")
    lab.opacity("PCM", 0)
    lab.opacity("PEM", 0)
    lab.canvas.hover(position=here)
    hovering = lab.pixels()
    seen.add(hovering)
    assert "PCM 0." in lab.text("readout")
    lab.page.mouse.wheel(0, -400)
    lab.canvas.drag_to(lab.canvas, source_position=here, target_position=middle)
    seen.add(lab.pixels())
    lab.canvas.dblclick(position=middle)
    lab.page.wait_for_timeout(600)
    lab.canvas.hover(position=here)
    # a double click brings the whole image back
    assert lab.pixels() == hovering and len(seen) == 6
    alive = [frame for frame in lab.sent[sent:] if "comm_msg" in str(frame)]
    assert alive == [] and sum(lab.got[got:]) < 10_000  # the server's own heartbeat at most


def test_a_clicked_prompt_shows_its_masks_and_what_it_is_related_to(lab):
    reason = ""
    lab.page.get_by_role("button", name="Why it was dropped").click()
    while "explains it" not in reason:
        lab.press("n")
        reason = lab.text("detail")
        assert not reason.startswith(f"Prompt {lab.numbers()[1] - 1}:"), "none is eliminated"
    value, threshold = re.search(r"PEM (\S+), more than (\S+)\.", reason).groups()
    assert float(value) > float(threshold)
    lab.until("document.querySelectorAll('.aop-detail button').length === 3")
    lab.shot("4_prompt")
    before = lab.pixels()
    lab.page.locator(".aop-detail button").first.click()
    assert lab.pixels() != before  # only one of the three masks
    lab.press("Escape")
    assert lab.text("detail") == ""
    x, y = map(float, re.search(r"at (\S+), ([\d.]+)", reason).groups())
    lab.canvas.click(position=lab.place(x, y))
    lab.says("detail", reason.split("\n")[0])
    lab.press("Escape")
    lab.page.get_by_role("button", name="What was found").click()


def test_rounds_can_be_played(lab):
    lab.opacity("PEM", 60)
    lab.page.mouse.move(5, 5)  # no mask lights up under the pointer
    states, waiting = [lab.pixels()], [0]
    while waiting[-1] < lab.numbers()[1]:
        lab.press("[")
        states.append(lab.pixels())
        count = lab.page.locator(".aop-status", has_text="waiting").locator("b").inner_text()
        waiting.append(int(count))
        lab.shot(f"5_round_{len(waiting)}")
    assert waiting == sorted(set(waiting)) and 2 < len(waiting) <= ROUNDS + 1
    assert len(set(states)) == len(states)
    lab.page.get_by_title("play the rounds").click()
    lab.until("!document.querySelector('.aop-statuses').innerText.includes('waiting')")
    assert lab.pixels() == states[0]
    lab.opacity("PEM", 0)


def test_points_are_set_by_mouse_and_keyboard_and_undone(lab):
    lab.settled()
    _, total = lab.numbers()
    lab.opacity("Prompts", 0)  # every place is empty then
    lab.canvas.click(position=lab.place(100, 100), modifiers=["Shift"])
    lab.says("message", "click the object first")
    lab.canvas.click(position=lab.place(112, 112))
    lab.says("badge", f"of {total + 1}")
    lab.press("Shift+ArrowLeft", "Shift+ArrowUp", "Enter")
    lab.says("badge", f"of {total + 2}")
    lab.opacity("Prompts", 100)
    lab.shot("6_by_hand")
    before = lab.pixels()
    lab.canvas.click(position=lab.place(20, 200), modifiers=["Shift"])
    lab.until("old => document.querySelector('.aop-canvas').toDataURL() !== old", before)
    lab.settled()
    assert lab.numbers()[1] == total + 2  # background of the last object, not another one
    for _ in range(2):
        lab.page.get_by_role("button", name="Undo").click()
    lab.press("u")
    lab.says("badge", f"of {total}")


def test_exports_hold_the_masks_that_are_shown(lab):
    files = []
    for name in ("COCO", "Labels", "Overlay"):
        with lab.page.expect_download() as waiting:
            lab.page.get_by_role("button", name=name, exact=True).click()
        files.append(SHOTS / f"7_{waiting.value.suggested_filename}")
        waiting.value.save_as(files[-1])
    coco, images = json.loads(files[0].read_text()), list(map(Image.open, files[1:]))
    assert f"{len(coco['annotations'])} masks" in lab.text("badge")
    assert len(np.unique(images[0])) > 0.8 * len(coco["annotations"])
    assert [image.size for image in images] == [(SIDE, SIDE)] * 2
    lab.page.get_by_role("button", name="Copy Python").click()
    lab.says("message", "Copied")
    call = "aop.explore('own.png', sam='mobile_sam', method='aop', params=aop.AsfParams("
    assert lab.page.evaluate("navigator.clipboard.readText()").startswith(call)


def test_quality_hides_masks_at_once_and_files_follow(lab, tmp_path):
    def counts() -> tuple[int, ...]:
        found = re.search(r"(\d+) of (\d+) masks shown", lab.text("quality"))
        return tuple(map(int, found.groups()))

    least = lab.page.get_by_label("least predicted IoU", exact=True)
    lab.opacity("Masks", 80)
    before, (shown, n), asked = lab.pixels(), counts(), len(lab.sent)
    least.fill("0.96")
    assert shown == n and 0 < counts()[0] < n and lab.pixels() != before
    assert len(lab.sent) == asked, "the kernel is asked nothing"
    lab.shot("7_quality")
    with lab.page.expect_download() as waiting:
        lab.page.get_by_role("button", name="COCO").click()
    waiting.value.save_as(tmp_path / "coco.json")
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert len(coco["annotations"]) == counts()[0]
    least.fill(least.get_attribute("min"))
    assert counts() == (n, n) and lab.pixels() == before


def test_another_method_is_shown_side_by_side(lab):
    lab.page.get_by_role("combobox", name="Compare with").select_option("AMG-S")
    lab.until("document.querySelectorAll('.aop-badge')[1]?.innerText.startsWith('AMG-S 256')")
    lab.settled()
    one = lab.pixels()
    lab.canvas.hover(position={"x": 150, "y": 150})
    lab.page.mouse.wheel(0, -500)
    lab.shot("8_side_by_side")
    assert lab.pixels() != one
    lab.page.get_by_role("combobox", name="Compare with").select_option("none")
    lab.until("document.querySelectorAll('.aop-badge').length === 1")


def test_another_image_and_one_of_the_persons_own_can_be_opened(lab, tmp_path):
    lab.page.get_by_role("combobox", name="Image").select_option("000000311303.jpg")
    lab.says("badge", "mIoU")
    lab.settled()
    assert lab.text("message") == ""  # no longer what was copied before
    before = lab.pixels()
    lab.opacity("Ground truth", 100)
    assert lab.pixels() != before
    lab.shot("8_ground_truth")
    Image.fromarray(open_dataset("photos")[6].image[:150, :SIDE]).save(tmp_path / "mine.png")
    with lab.page.expect_file_chooser() as chooser:
        lab.page.get_by_role("button", name="Upload").click()
    chooser.value.set_files(tmp_path / "mine.png")
    lab.until("document.querySelector('.aop-badge')?.innerText.includes('mIoU') === false")
    lab.settled()
    lab.shot("8_own")
    assert lab.page.locator(".jp-RenderedText[data-mime-type*=stderr]").count() == 0


def test_text_is_readable_in_the_dark_theme(lab):
    lab.page.get_by_role("menuitem", name="Settings", exact=True).click()
    lab.page.get_by_text("Theme", exact=True).hover()
    lab.page.get_by_text("JupyterLab Dark", exact=True).click()
    lab.until("document.body.dataset.jpThemeLight === 'false'")
    lab.page.wait_for_timeout(500)
    lab.shot("9_dark")
    colours = lab.page.locator(".aop-layer span").first.evaluate("""e =>
      [getComputedStyle(e).color, getComputedStyle(e.closest(".jp-Notebook")).backgroundColor]""")
    text, ground = (np.mean([int(v) for v in re.findall(r"\d+", c)[:3]]) for c in colours)
    assert text - ground > 100


def test_a_restarted_kernel_is_said_in_the_message_line(lab):
    lab.page.get_by_role("menuitem", name="Kernel", exact=True).click()
    lab.page.get_by_text("Restart Kernel…", exact=True).click()
    lab.page.get_by_role("button", name="Confirm Kernel Restart").click()
    lab.says("message", "kernel was restarted")
    lab.shot("10_restarted")
    before = lab.pixels()
    lab.press("5")  # what is there can still be looked at
    assert lab.pixels() != before and lab.errors == []


def test_voila_shows_the_same_page(browser, tmp_path):
    notebook_in(tmp_path / "notebooks")
    command = *command_of("app"), "--Voila.ip=127.0.0.1"
    with served(tmp_path, "", *command) as address:
        page = Page(browser.new_page(viewport={"width": 1280, "height": 1000}))
        page.page.goto(address)
        page.says("badge", "masks")
        page.shot("11_voila")
        assert page.page.title() == "AoP-SAM explorer"
        assert "explorer." not in page.page.locator("body").inner_text()  # no tail for Python
        assert page.errors == []
        assert "waiting" not in page.text("statuses")
        page.page.close()


@pytest.mark.parametrize("target", ["lab", "app"])
def test_make_starts_servers_that_take_large_uploads(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    (command,) = [line for line in done.stdout.splitlines() if "explore_pcm_pem" in line]
    assert re.search(r'tornado_settings="{.websocket_max_message_size.: 268435456}"', command)


def test_of_two_views_one_saves_and_uploads_above_the_servers_limit_are_told(browser, tmp_path):
    path = notebook_in(tmp_path)
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_code_cell("explorer"))  # a second view of it
    nbformat.write(notebook, path)
    noise = np.random.default_rng(0).integers(0, 256, (2030, 2000, 3), dtype=np.uint8)
    for name, rows in (("below.png", 2000), ("above.png", 2030)):
        Image.fromarray(noise[:rows]).save(tmp_path / name, compress_level=0)
    limit = "--Voila.tornado_settings={'websocket_max_message_size': 12100000}"
    with served(tmp_path, "", "voila", path.name, "--Voila.ip=127.0.0.1", limit) as address:
        page = Page(browser.new_page(viewport={"width": 1280, "height": 2000}))
        files = []
        page.page.on("download", lambda download: files.append(download.suggested_filename))
        page.page.goto(address)
        page.until("document.querySelectorAll('.aop-badge').length === 2")
        first, second = (page.page.locator(".aop").nth(i) for i in (0, 1))
        second.get_by_role("button", name="COCO").click()
        second.get_by_text("Saved own.json.").wait_for()
        page.page.wait_for_timeout(500)
        assert files == ["own.json"] and first.get_by_text("Saved own.json.").count() == 0
        for name, said in (("above.png", "above.png (12.2 MB) has not arrived"), ("below.png", "")):
            with page.page.expect_file_chooser() as chooser:
                first.get_by_role("button", name="Your own").click()
            chooser.value.set_files(tmp_path / name)
            page.says("message", f"Sending {name} (12.")
            if said:
                page.says("message", said)
                page.shot("12_not_arrived")
        page.until("[...document.querySelectorAll('option')].some(o => o.text === 'below.png')")
        page.until("!document.querySelector('.aop-message').innerText.includes('Sending')")
        page.page.close()


# --- pane.js alone, without a kernel ---


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
