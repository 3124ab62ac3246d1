from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from small import RunsCode, build_small_sam

from aopsam_lab import cli
from aopsam_lab.detector import load_detector
from aopsam_lab.sam import download as fetching
from aopsam_lab.sam import zoo
from aopsam_lab.sam.download import OFFICIAL, OfficialFile, cache_folder, download, kept_file
from aopsam_lab.sam.zoo import load_sam


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path.

    `cut`: for each coming answer, after how many bytes to hang up (None: never).
    """

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cut, self.asked, self.status = content, True, [], [], 200
        self.released = threading.Event()
        self.released.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        if server.status != 200:
            return self.send_error(server.status)
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        body = server.content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header(
                "Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}"
            )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        limit = server.cut.pop(0) if server.cut else None
        self.wfile.write(body[: len(body) // 2 if limit is None else limit])
        server.released.wait(20)
        if limit is None:
            self.wfile.write(body[len(body) // 2 :])

    def log_message(self, *_):
        pass


@pytest.fixture
def content():
    return b"no weights" + os.urandom(2_999_990)


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    """A server that passes for the official address of vit_b, and an empty cache folder."""
    server = Server(content)
    entry = OfficialFile(
        server.url("sam_vit_b.pth"), hashlib.sha256(content).hexdigest(), len(content), "Apache-2.0"
    )
    monkeypatch.setitem(OFFICIAL, "vit_b", entry)
    monkeypatch.setenv(fetching.CACHE_VARIABLE, str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def files():
    return sorted(path.name for path in cache_folder().iterdir() if path.suffix != ".lock")


def test_a_file_is_fetched_once(server, content, capsys):
    assert cli.main(["download", "vit_b"]) == 0
    assert kept_file("vit_b").read_bytes() == content and files() == ["sam_vit_b.pth"]
    out = capsys.readouterr()
    # the bar ends at the full size
    assert str(kept_file("vit_b")) in out.out and "3.00M" in out.err
    assert cli.main(["download", "vit_b"]) == 0
    assert server.asked == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_goes_on_where_it_was(server, content, ranges):
    server.ranges, server.cut = ranges, [1_200_000, 300_000]
    assert download("vit_b", progress=False).read_bytes() == content
    assert server.asked[0] is None and len(server.asked) == 3
    assert all(re.fullmatch(r"bytes=\d+-", asked) for asked in server.asked[1:])
    assert files() == ["sam_vit_b.pth"]


def test_a_later_call_takes_up_what_an_earlier_one_left(server, content):
    server.cut = [700_000] + [0] * (fetching.ATTEMPTS - 1)
    with pytest.raises(ConnectionError, match="of 3,000,000 bytes are here.*goes on from there"):
        download("vit_b", progress=False)
    kept = cache_folder() / "sam_vit_b.pth.part"
    have = kept.stat().st_size
    assert 0 < have <= 700_000 and kept.read_bytes() == content[:have]
    server.asked.clear()
    assert download("vit_b", progress=False).read_bytes() == content
    assert server.asked == [f"bytes={have}-"] and files() == ["sam_vit_b.pth"]


def test_a_spoilt_part_is_not_held_on_to(server, content):
    cache_folder().mkdir(parents=True)
    part = cache_folder() / "sam_vit_b.pth.part"
    part.write_bytes(b"?" * 1000)
    assert download("vit_b", progress=False).read_bytes() == content
    part.write_bytes(content + b"more than there is")
    kept_file("vit_b").unlink()
    assert download("vit_b", progress=False).read_bytes() == content


def test_another_file_at_the_address_is_refused(server, content, capsys):
    server.content = content[:-1] + b"?"
    assert cli.main(["download", "vit_b"]) == 2
    error = capsys.readouterr().err
    assert "did not give the official sam_vit_b.pth" in error and "Try again later" in error
    assert files() == []


def test_a_file_that_is_not_there(server, capsys):
    server.status = 404
    assert cli.main(["download", "vit_b"]) == 2
    assert "HTTP 404" in capsys.readouterr().err
    assert server.asked == [None], "a server that answers no is not asked again"


def test_no_room(server, monkeypatch):
    monkeypatch.setattr(
        fetching.shutil, "disk_usage", lambda _: fetching.shutil._ntuple_diskusage(9, 8, 1_000_000)
    )
    with pytest.raises(OSError, match="needs 3 MB and .* has 1 MB free.*AOPSAM_CACHE"):
        download("vit_b", progress=False)


OTHER_PROCESS = """
import sys
from aopsam_lab.sam.download import OFFICIAL, OfficialFile, download
url, sha256, size = sys.argv[1:]
OFFICIAL["vit_b"] = OfficialFile(url, sha256, int(size), "")
print("start", flush=True)
print(download("vit_b", progress=False), flush=True)
"""


def test_a_second_process_waits_for_the_first(server, content):
    entry = OFFICIAL["vit_b"]
    server.released.clear()  # the server stops half way
    first = threading.Thread(target=download, args=("vit_b", False))
    first.start()
    while not server.asked:
        pass
    command = [sys.executable, "-c", OTHER_PROCESS, entry.url, entry.sha256, str(entry.size)]
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert second.stdout.readline() == "start\n"
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1)
    server.released.set()
    first.join()
    assert second.communicate(timeout=30)[0].strip() == str(kept_file("vit_b"))
    assert server.asked == [None], "only the first asked the server"
    assert kept_file("vit_b").read_bytes() == content


def test_a_tampered_file_is_refused_and_can_be_fetched_anew(server, content):
    download("vit_b", progress=False)
    kept_file("vit_b").write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match="not the official sam_vit_b.pth.*download vit_b. fetches it anew"
    ):
        load_sam("vit_b", device="cpu")
    assert download("vit_b", progress=False).read_bytes() == content


def test_an_official_file_that_turns_out_to_hold_code_never_runs(server, tmp_path, monkeypatch):
    torch.save({"model": RunsCode(tmp_path / "ran")}, tmp_path / "evil.pth")
    server.content = (tmp_path / "evil.pth").read_bytes()
    # as if the official file itself had been replaced
    wanted = hashlib.sha256(server.content).hexdigest()
    entry = OfficialFile(OFFICIAL["vit_b"].url, wanted, len(server.content), "")
    monkeypatch.setitem(OFFICIAL, "vit_b", entry)
    with pytest.raises(ValueError, match="Python objects"):
        load_sam("vit_b", device="cpu", fetch=True)
    assert not (tmp_path / "ran").exists()


def test_load_sam_fetches_and_loads(server, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(zoo.MODELS, "vit_b", partial(build_small_sam, 768, 12))
    original = build_small_sam(768, 12)
    torch.save(original.state_dict(), tmp_path / "sam.pth")
    server.content = (tmp_path / "sam.pth").read_bytes()
    wanted = hashlib.sha256(server.content).hexdigest()
    entry = OfficialFile(server.url("sam_vit_b.pth"), wanted, len(server.content), "Apache-2.0")
    monkeypatch.setitem(OFFICIAL, "vit_b", entry)
    with pytest.raises(
        ValueError, match="sam_vit_b.pth .* MB.: run .python -m aopsam_lab download vit_b"
    ):
        load_sam("vit_b", device="cpu")  # nobody at a terminal, so nothing is fetched unasked
    assert server.asked == []
    sam = load_sam("vit_b", device="cpu", fetch=True)
    assert sam.spec.sha256 == wanted
    assert all(
        torch.equal(value, original.state_dict()[key]) for key, value in sam.state_dict().items()
    )
    assert load_sam("vit_b", device="cpu").spec == sam.spec and len(server.asked) == 1


@pytest.mark.parametrize(("answer", "fetched"), [("y\n", True), ("\n", False), ("no\n", False)])
def test_a_person_at_a_terminal_is_asked(server, content, monkeypatch, capsys, answer, fetched):
    class Terminal:
        isatty = staticmethod(lambda: True)
        readline = staticmethod(lambda: answer)

    monkeypatch.setattr(fetching.sys, "stdin", Terminal())
    monkeypatch.setattr(fetching.sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="sam_vit_b.pth holds" if fetched else "needs its weights"):
        load_sam("vit_b", device="cpu")
    assert "sam_vit_b.pth (3 MB, Apache-2.0)" in capsys.readouterr().err
    assert kept_file("vit_b").exists() == fetched


def test_the_official_detector_is_asked_for_by_name(server):
    with pytest.raises(ValueError, match="download yolov8n"):
        load_detector("yolov8n", "cpu")


def test_where_files_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(fetching.CACHE_VARIABLE, str(tmp_path))
    assert kept_file("vit_h") == tmp_path / "sam_vit_h_4b8939.pth"
    monkeypatch.delenv(fetching.CACHE_VARIABLE)
    assert cache_folder().name == "aopsam_lab" or "aopsam_lab" in cache_folder().parts
    with pytest.raises(ValueError, match="Choose one of vit_b"):
        download("vit_x")


def test_the_table_of_official_files():
    assert list(OFFICIAL) == ["vit_b", "vit_l", "vit_h", "yolov8n"]
    for entry in OFFICIAL.values():
        assert entry.url.startswith("https://")
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.size > 1e6
