"""Weights files: which are loaded, which are refused, and with which words."""

import hashlib
import zipfile
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import RunsCode, build_small_sam

from aopsam_lab.sam.zoo import MODELS, identify, load_sam, resolve_device, spec_of


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
    own = spec_of(build_small_sam())
    assert (own.name, own.pred_iou_thresh, own.stability_score_thresh) == ("custom", 0.88, 0.95)


@pytest.mark.parametrize("name", ["mobile_sam", "vit_b", "vit_l", "vit_h"])
def test_each_model_is_known_by_its_weights(name):
    with torch.device("cpu" if name == "mobile_sam" else "meta"):  # shapes without the gigabytes
        assert identify(MODELS[name]().state_dict()) == name
    assert identify({"image_encoder.patch_embed.proj.weight": torch.zeros(7, 3, 16, 16)}) is None


@pytest.mark.parametrize(("name", "width"), [("vit_b", 768), ("vit_l", 1024), ("vit_h", 1280)])
def test_a_vit_loads_under_its_own_name_only(tmp_path, monkeypatch, name, width):
    original = build_small_sam(width, 8).state_dict()
    torch.save(original, tmp_path / "sam.pth")
    monkeypatch.setitem(MODELS, name, partial(build_small_sam, width, 8))
    loaded = load_sam(name, tmp_path / "sam.pth", "cpu").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in original.items())
    other = "vit_h" if name == "vit_b" else "vit_b"
    with pytest.raises(ValueError, match=f"of {name}, not of {other}.*load_sam\\('{name}'"):
        load_sam(other, tmp_path / "sam.pth", "cpu")


def test_weights_of_another_shape_are_refused_by_name(small_file, tmp_path):
    state = load_file(small_file)
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt does not fit small: .*iou_token"):
        load_sam("small", tmp_path / "odd.pt", "cpu")


def test_half_precision_wrapped_and_legacy_files_are_loaded(small_file, tmp_path):
    state = load_file(small_file)
    torch.save({"model": state}, tmp_path / "wrapped.pt")
    torch.save({"state_dict": state}, tmp_path / "state.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "half")
    for name in ("wrapped.pt", "state.pt", "legacy.pt", "half"):
        loaded = load_sam("small", tmp_path / name, "cpu").state_dict()
        assert all(torch.allclose(value, state[key], atol=1e-3) for key, value in loaded.items())
        assert loaded["mask_decoder.iou_token.weight"].dtype == torch.float32


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_does_not_run(tmp_path, zipped):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save({"weights": RunsCode(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="never run"):
        load_sam("vit_b", path, "cpu")
    assert not marker.exists()


def test_files_that_are_no_checkpoints_are_refused(small_file, tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    whole = small_file.read_bytes()
    contents = [b"", b"<html>404: not found</html>", b"\x80\x02half", whole[: len(whole) // 2]]
    for content in (*contents, (tmp_path / "list.pt").read_bytes()):
        (tmp_path / "sam.pth").write_bytes(content)
        with pytest.raises(ValueError, match="sam.pth is damaged, or no checkpoint"):
            load_sam("small", tmp_path / "sam.pth", "cpu")


def test_a_file_name_or_device_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_sam("vit_b", tmp_path / "absent.pth", "cpu")
    with pytest.raises(ValueError, match="no SAM called 'tiny'. Choose one of mobile_sam, vit_b"):
        load_sam("tiny")
    with pytest.raises(ValueError, match="cannot be used here"):
        resolve_device("no such device")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.int8, torch.bool])
def test_weights_that_are_no_finite_floats_are_refused(small_file, tmp_path, bad):
    state = load_file(small_file)
    key = "mask_decoder.iou_token.weight"
    state[key] = state[key].to(bad) if isinstance(bad, torch.dtype) else state[key] * bad
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=f"bad.pt does not fit small: {key} holds"):
        load_sam("small", tmp_path / "bad.pt", "cpu")


def test_a_checkpoint_that_was_zipped_again_has_the_same_numbers(small_file, tmp_path):
    state = load_file(small_file)
    torch.save(state, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    loaded = load_sam("small", tmp_path / "deflated.pt", "cpu").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_file_of_another_sha256_than_asked_for_is_refused(small_file):
    right = hashlib.sha256(small_file.read_bytes()).hexdigest()
    assert load_sam("small", small_file, "cpu", sha256=right).spec.sha256 == right
    with pytest.raises(ValueError, match=f"has the sha256 {right}, not 00"):
        load_sam("small", small_file, "cpu", sha256="00")


@pytest.mark.parametrize(
    ("name", "value"), [("pred_iou_thresh", "nan"), ("stability_score_thresh", "many")]
)
def test_thresholds_that_are_no_numbers_are_refused(small_file, tmp_path, name, value):
    save_file(load_file(small_file), tmp_path / "odd.safetensors", metadata={name: value})
    with pytest.raises(ValueError, match="odd.safetensors does not fit small"):
        load_sam("small", tmp_path / "odd.safetensors", "cpu")
