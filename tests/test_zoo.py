"""Weights files: which are loaded, which are refused, and with which words."""

from __future__ import annotations

import hashlib
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import RunsCode, build_small_sam

from aopsam_lab.sam.mobile import build_mobile_sam
from aopsam_lab.sam.zoo import BUNDLED, MODELS, identify, load_sam, resolve_device, spec_of


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    thresholds = {"pred_iou_thresh": "0.6", "stability_score_thresh": "0.7"}
    save_file(build_small_sam().state_dict(), path, metadata=thresholds)
    return path


def test_thresholds_and_hash_come_from_the_file(small_file):
    sam = load_sam("small", small_file, "cpu")
    assert not sam.training and not any(value.requires_grad for value in sam.parameters())
    spec = spec_of(sam)
    assert (spec.name, spec.pred_iou_thresh, spec.stability_score_thresh) == ("small", 0.6, 0.7)
    assert spec.sha256 == hashlib.sha256(small_file.read_bytes()).hexdigest()


def test_thresholds_that_are_no_numbers(tmp_path):
    path = tmp_path / "small.safetensors"
    save_file(build_small_sam().state_dict(), path, metadata={"pred_iou_thresh": "high"})
    with pytest.raises(ValueError, match="pred_iou_thresh = 'high'"):
        load_sam("small", path, "cpu")


def test_a_sam_of_the_callers_own():
    spec = spec_of(build_small_sam())
    assert (spec.name, spec.pred_iou_thresh, spec.stability_score_thresh) == ("custom", 0.88, 0.95)


@pytest.mark.parametrize("name", ["mobile_sam", "vit_b", "vit_l", "vit_h"])
def test_each_model_is_known_by_its_weights(name):
    with torch.device("cpu" if name == "mobile_sam" else "meta"):  # shapes without the gigabytes
        assert identify(MODELS[name]().state_dict()) == name


def test_unknown_weights_are_not_named():
    assert identify({"head.weight": torch.zeros(2)}) is None
    assert identify({"image_encoder.patch_embed.proj.weight": torch.zeros(7, 3, 16, 16)}) is None
    assert (
        identify({"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(7, 3, 7, 7)})
        == "SAM 2"
    )


def test_wrong_name_for_the_file(tmp_path):
    with pytest.raises(ValueError, match="of mobile_sam, not of vit_b.*load_sam\\('mobile_sam'"):
        load_sam("vit_b", BUNDLED["mobile_sam"], "cpu")
    save_file({"image_encoder.trunk.x": torch.zeros(1)}, tmp_path / "sam2.safetensors")
    with pytest.raises(ValueError, match="SAM 2, not of vit_b. That model is not supported"):
        load_sam("vit_b", tmp_path / "sam2.safetensors", "cpu")


def test_almost_the_right_weights(tmp_path):
    state = build_mobile_sam().state_dict()
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)
    state["extra"] = torch.zeros(1)
    del state["mask_decoder.mask_tokens.weight"]
    torch.save(state, tmp_path / "odd.pt")
    message = "lacks 1 of .*mask_tokens.* 1 others.*extra.*iou_token.*\\(1, 7\\), not \\(1, 256\\)"
    with pytest.raises(ValueError, match=message):
        load_sam("mobile_sam", tmp_path / "odd.pt", "cpu")


def test_half_precision_wrapped_and_legacy_files(small_file, tmp_path):
    state = load_file(small_file)
    torch.save({"model": state}, tmp_path / "wrapped.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "half")
    for name in ("wrapped.pt", "legacy.pt", "half"):
        loaded = load_sam("small", tmp_path / name, "cpu").state_dict()
        assert all(torch.allclose(value, state[key], atol=1e-3) for key, value in loaded.items())
        assert loaded["mask_decoder.iou_token.weight"].dtype == torch.float32


def test_truncated_files(small_file, tmp_path):
    state = load_file(small_file)
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    files = {
        small_file: "cut short",
        tmp_path / "new.pt": "cut short",
        tmp_path / "old.pt": "damaged",
    }
    for path, words in files.items():
        data = path.read_bytes()
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(data[: len(data) * 2 // 3])
        with pytest.raises(ValueError, match=words):
            load_sam("small", cut, "cpu")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_does_not_run(tmp_path, zipped):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save({"weights": RunsCode(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="Python objects"):
        load_sam("vit_b", path, "cpu")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"no weights here", b"<html>404: not found</html>", b"\x80\x02half"]
)
@pytest.mark.parametrize("name", ["sam.pth", "sam.safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_sam("vit_b", path, "cpu")


def test_other_contents(tmp_path):
    path = tmp_path / "list.pt"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        load_sam("vit_b", path, "cpu")
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(ValueError, match="some.zip"):
        load_sam("vit_b", tmp_path / "some.zip", "cpu")
    with pytest.raises(ValueError, match="folder"):
        load_sam("vit_b", tmp_path, "cpu")


def test_missing_file_name_and_device(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_sam("vit_b", tmp_path / "absent.pth", "cpu")
    monkeypatch.setenv("AOPSAM_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="sam_vit_l_0b3195.pth .*checkpoint"):
        load_sam("vit_l", device="cpu")
    with pytest.raises(ValueError, match="no SAM called 'tiny'. Choose one of mobile_sam, vit_b"):
        load_sam("tiny")
    with pytest.raises(ValueError, match="cannot be used here"):
        resolve_device("no such device")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="cannot be used here"):
            resolve_device("cuda")
