"""Official files: fetched once, checked, and asked for by name."""

import hashlib
import http.server
import re
import threading
from functools import partial

import pytest
import torch
from small import build_small_sam

from aopsam_lab import __main__ as cli
from aopsam_lab.detector import load_detector
from aopsam_lab.sam import download as fetching
from aopsam_lab.sam import zoo
from aopsam_lab.sam.download import OFFICIAL, OfficialFile, cache_folder, download, kept_file
from aopsam_lab.sam.zoo import load_sam


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `content` at any path, or its `status` if that is an error."""

    def do_GET(self):
        self.server.asked += 1
        if self.server.status != 200:
            return self.send_error(self.server.status)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that passes for the official address of vit_b, and an empty cache folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.status = 0, 200
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def offer(content: bytes) -> OfficialFile:
        url = f"http://127.0.0.1:{server.server_port}/sam_vit_b.pth"
        sha256 = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(OFFICIAL, "vit_b", OfficialFile(url, sha256, len(content), "free"))
        server.content = content

    server.offer = offer
    offer(b"no weights" * 100_000)
    monkeypatch.setenv(fetching.CACHE_VARIABLE, str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once_and_anew_where_it_was_changed(server, capsys):
    for _ in range(2):
        assert cli.main(["download", "vit_b"]) == 0
    out = capsys.readouterr()
    assert str(kept_file("vit_b")) in out.out and "1.00M" in out.err, "the bar ends at the size"
    assert list(cache_folder().iterdir()) == [kept_file("vit_b")] and server.asked == 1
    kept_file("vit_b").write_bytes(server.content[:9])
    with pytest.raises(ValueError, match="not the official sam_vit_b.pth.*vit_b. fetches it anew"):
        load_sam("vit_b", device="cpu")
    assert download("vit_b").read_bytes() == server.content


def test_what_cannot_be_fetched_is_one_clear_error(server, capsys):
    server.content = server.content[:-1] + b"?"
    assert cli.main(["download", "vit_b"]) == 2
    assert "does not match the known hash" in capsys.readouterr().err
    server.status = 404
    assert cli.main(["download", "vit_b"]) == 2
    assert "could not be fetched (404" in capsys.readouterr().err
    assert list(cache_folder().iterdir()) == []


def test_load_sam_says_what_to_fetch_and_loads_it(server, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(zoo.MODELS, "vit_b", partial(build_small_sam, 768, 12))
    original = build_small_sam(768, 12).state_dict()
    torch.save(original, tmp_path / "sam.pth")
    server.offer((tmp_path / "sam.pth").read_bytes())
    with pytest.raises(ValueError, match="sam_vit_b.pth .* MB.: run .* download vit_b.*checkpoint"):
        load_sam("vit_b", device="cpu")
    with pytest.raises(ValueError, match="download yolov8n"):
        load_detector("yolov8n", "cpu")
    assert server.asked == 0
    download("vit_b")
    sam = load_sam("vit_b", device="cpu")
    assert sam.spec.sha256 == OFFICIAL["vit_b"].sha256
    assert all(torch.equal(value, original[key]) for key, value in sam.state_dict().items())


def test_which_files_there_are_and_where_they_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(fetching.CACHE_VARIABLE, str(tmp_path))
    assert kept_file("vit_h") == tmp_path / "sam_vit_h_4b8939.pth"
    monkeypatch.delenv(fetching.CACHE_VARIABLE)
    assert "aopsam_lab" in cache_folder().parts
    with pytest.raises(ValueError, match="Choose one of vit_b"):
        download("vit_x")
    assert list(OFFICIAL) == ["vit_b", "vit_l", "vit_h", "yolov8n"]
    for entry in OFFICIAL.values():
        assert entry.url.startswith("https://") and re.fullmatch("[0-9a-f]{64}", entry.sha256)
