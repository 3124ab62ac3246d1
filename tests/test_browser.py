"""The explorer in a real browser, Chromium on a local JupyterLab; screenshots: build/browser/."""

import json
import os
import re
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

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "explore_pcm_pem.ipynb"
SHOTS = ROOT / "build" / "browser"
SIDE = 224  # of the image in the notebook, pixels
PATIENCE = 180_000  # ms: a busy machine is slow, not broken


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


def notebook_in(folder: Path) -> Path:
    """The notebook itself with few prompts, so that two busy cores are enough."""
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

    def masks(self) -> int:
        """Of "35 decoded of 47 · 30 masks ..." the number 30."""
        return int(re.search(r"(\d+) masks", self.text("badge"))[1])

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

    def changes(self, before: str) -> None:
        """Until the canvas shows something else."""
        self.until("old => document.querySelector('.aop-canvas').toDataURL() !== old", before)

    def drag(self, start: dict, end: dict, button: str, shot: str = "") -> None:
        """Drag between two points of the canvas."""
        box, mouse = self.canvas.bounding_box(), self.page.mouse
        mouse.move(box["x"] + start["x"], box["y"] + start["y"])
        mouse.down(button=button)
        mouse.move(box["x"] + end["x"], box["y"] + end["y"], steps=5)
        if shot:
            self.shot(shot)
        mouse.up(button=button)

    def settled(self) -> None:
        """Until no answer is under way."""
        self.page.wait_for_timeout(250)
        self.until("document.querySelector('.aop-busy').hidden")

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """The notebook, opened in JupyterLab and run by its menu."""
    folder = tmp_path_factory.mktemp("lab")
    path = notebook_in(folder)
    command = "jupyter", "lab", "--allow-root", "--IdentityProvider.token="
    with served(folder, "/api", *command) as address:
        context = browser.new_context(viewport={"width": 1440, "height": 1000})
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
        lab = Page(context.new_page())
        lab.page.goto(f"{address}/lab/tree/{path.name}?reset")
        lab.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        lab.page.add_style_tag(content=".Toastify { display: none }")  # the offer of news
        # "idle" may be said before the kernel listens
        while not any("execute_request" in str(frame) for frame in lab.sent):
            lab.page.get_by_role("menuitem", name="Run", exact=True).click()
            lab.page.get_by_text("Run All Cells", exact=True).click()
            lab.page.wait_for_timeout(2000)
        # run to its end, the notebook shows its last cell, and JupyterLab may take those out of
        # sight off the page
        lab.until("""() => {
          const panels = document.querySelectorAll(".jp-WindowedPanel-outer");
          for (const panel of panels) panel.scrollTo(0, 0);
          return document.querySelector(".aop-badge")?.textContent.includes("masks");
        }""")
        lab.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        lab.page.keyboard.press("Control+b")  # the file list gives its room to the image
        output = lab.page.locator(".jp-OutputArea-output:has(.aop)")
        output.evaluate("element => element.scrollIntoView()")
        yield lab
        context.close()


def test_the_notebook_runs_and_shows_the_image(lab):
    lab.shot("1_opened")
    assert lab.errors == [] and lab.text("message") == ""
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
    away = lab.pixels()
    lab.canvas.hover(position=here)
    seen.add(lab.pixels())
    assert "PCM 0." in lab.text("readout")
    lab.page.mouse.wheel(0, -400)
    lab.drag(here, middle, "middle")
    seen.add(lab.pixels())
    lab.press("0")
    lab.page.mouse.move(5, 5)
    assert lab.pixels() == away and len(seen) == 6, "the whole image is back"
    lab.page.wait_for_timeout(1000)
    alive = [frame for frame in lab.sent[sent:] if "comm_msg" in str(frame)]
    assert all("hover" in str(frame) for frame in alive)  # and the server's own heartbeat
    assert sum(lab.got[got:]) < 10_000 + 5_000 * len(alive), "no more than previews"


def test_a_clicked_prompt_shows_its_masks_and_what_it_is_related_to(lab):
    reason = ""
    while "explains it" not in reason:
        lab.press(".")
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


def test_hover_previews_and_clicks_boxes_and_keys_make_objects(lab):
    lab.settled()
    lab.press("n")
    _, total = lab.numbers()
    lab.opacity("Prompts", 0)  # every place is empty then
    lab.canvas.click(position=lab.place(100, 100), modifiers=["Shift"])
    lab.says("message", "click the object first")
    lab.page.mouse.move(5, 5)
    lab.page.wait_for_timeout(500)
    lab.opacity("Masks", 0)  # nothing is there to light up but the preview
    before = lab.pixels()
    lab.canvas.hover(position=lab.place(112, 112))
    lab.changes(before)
    lab.shot("6_preview")
    lab.opacity("Masks", 80)
    assert lab.numbers()[1] == total, "a preview is no object"
    lab.canvas.click(position=lab.place(112, 112))
    lab.says("badge", f"of {total + 1}")
    lab.says("detail", "group: predicted IoU")
    lab.shot("6_object")
    lab.canvas.click(position=lab.place(20, 200), button="right")
    lab.says("detail", "as clicked")
    lab.press("2")  # the whole
    lab.says("detail .aop-only", "whole")
    lab.press("Backspace", "Backspace")  # the choice, then the background point
    lab.until("!document.querySelector('.aop-detail').innerText.includes('as clicked')")
    assert lab.numbers()[1] == total + 1
    lab.press("n", "Shift+ArrowLeft", "Shift+ArrowUp", "Enter")
    lab.says("badge", f"of {total + 2}")
    lab.press("n")
    lab.drag(lab.place(30, 30), lab.place(150, 190), "left", "6_box")
    lab.says("badge", f"of {total + 3}")
    lab.opacity("Prompts", 100)
    lab.shot("6_by_hand")
    lab.press("n", "Backspace", "Backspace")
    lab.says("badge", f"of {total + 1}")
    lab.page.get_by_role("button", name="Undo").click()
    lab.says("badge", f"of {total}")


def test_a_mask_is_selected_named_exported_alone_deleted_and_restored(lab):
    lab.settled()
    lab.press("n")
    lab.opacity("Prompts", 0)
    name, n = lab.page.get_by_label("name of the mask"), lab.masks()
    for x, y in ((112, 112), (60, 60), (170, 60), (60, 170), (170, 170), (112, 30)):
        lab.canvas.click(position=lab.place(x, y), modifiers=["Control"])
        lab.page.wait_for_timeout(500)
        if name.is_visible():
            break
    name.fill("thing")
    name.press("Enter")
    lab.page.mouse.move(5, 5)
    lab.canvas.hover(position=lab.place(x + 1, y))
    assert "thing" in lab.text("readout")
    lab.shot("6_named")
    with lab.page.expect_download() as waiting:
        lab.page.get_by_role("button", name="Export").click()
    coco = json.loads(Path(waiting.value.path()).read_text())
    assert len(coco["annotations"]) == 1 and coco["categories"][-1]["name"] == "thing"
    lab.press("Delete")
    lab.says("badge", f"{n - 1} masks")
    lab.page.get_by_role("button", name="Restore 1 deleted").click()
    lab.says("badge", f"{n} masks")
    lab.opacity("Prompts", 100)


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


def test_another_method_is_shown_side_by_side(lab):
    lab.page.get_by_role("combobox", name="Beside").select_option("amg_s")
    lab.until("document.querySelectorAll('.aop-badge')[1]?.innerText.startsWith('amg_s 256')")
    lab.settled()
    one = lab.pixels()
    lab.canvas.hover(position={"x": 150, "y": 150})
    lab.page.mouse.wheel(0, -500)
    lab.shot("8_side_by_side")
    assert lab.pixels() != one
    lab.page.get_by_role("combobox", name="Beside").select_option("nothing")
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
    files = [tmp_path / name for name in ("mine.png", "more.png")]
    for height, file in zip((150, 100), files, strict=True):
        Image.fromarray(open_dataset("photos")[6].image[:height, :SIDE]).save(file)
    with lab.page.expect_file_chooser() as chooser:
        lab.page.get_by_role("button", name="Your own").click()
    chooser.value.set_files(files)
    lab.until("document.querySelector('.aop-growing')")  # the photograph comes first
    lab.shot("8_growing")
    lab.until("document.querySelector('.aop-badge')?.innerText.includes('mIoU') === false")
    lab.settled()
    images = lab.page.get_by_role("combobox", name="Image")
    assert images.locator("option:checked").inner_text() == "mine.png"
    lab.page.get_by_label("a name", exact=True).fill("MORE")
    assert images.locator("option").all_inner_texts() == ["mine.png", "more.png"]
    lab.page.get_by_role("button", name="›").click()
    lab.says("badge", "masks")
    lab.settled()
    assert images.locator("option:checked").inner_text() == "more.png"
    lab.page.get_by_label("a name", exact=True).fill("")
    lab.shot("8_own")
    images = lab.page.get_by_role("combobox", name="Image")
    assert images.locator("option:checked").inner_text() == "mine.png"
    assert images.locator("option").last.inner_text() == "more.png"
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
    path = notebook_in(tmp_path)
    with served(tmp_path, "", "voila", path.name, "--Voila.ip=127.0.0.1") as address:
        page = Page(browser.new_page(viewport={"width": 1280, "height": 1000}))
        page.page.goto(address)
        page.says("badge", "masks")
        page.shot("11_voila")
        assert page.errors == []
        assert "waiting" not in page.text("statuses")
        page.page.close()
