from __future__ import annotations

import hashlib
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import Sam

from aopsam_lab.sam.mobile import build_mobile_sam
from aopsam_lab.sam.tiny import IMG_SIZE, build_tiny_sam
from aopsam_lab.sam.zoo import MODELS, identify, load_sam, resolve_device, spec_of


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    state = {key: value.contiguous() for key, value in build_tiny_sam().state_dict().items()}
    save_file(state, path, metadata={"pred_iou_thresh": "0.6", "stability_score_thresh": "0.7"})
    return path


@pytest.fixture(scope="module")
def mobile(tmp_path_factory):
    """An untrained MobileSAM (attention biases made non-zero, as training leaves them) and its checkpoint."""
    torch.manual_seed(0)
    sam = build_mobile_sam()
    with torch.no_grad():
        for name, value in sam.named_parameters():
            if "attention_biases" in name:
                value.normal_()
    sam.eval()  # after the change, as kornia 0.8 caches the biases here
    path = tmp_path_factory.mktemp("mobile") / "mobile_sam.pt"
    torch.save(sam.state_dict(), path)
    return sam, path


def test_bundled_tiny_is_a_plain_sam_ready_for_inference():
    sam = load_sam("tiny", device="cpu")
    assert type(sam) is Sam and not sam.training
    assert not any(parameter.requires_grad for parameter in sam.parameters())
    assert all(value.dtype == torch.float32 for value in sam.state_dict().values() if value.is_floating_point())
    spec = spec_of(sam)
    assert spec.name == "tiny" and len(spec.sha256) == 64
    assert 0 < spec.pred_iou_thresh < 1 and 0 < spec.stability_score_thresh < 1


def test_stock_predictor_and_mask_generator_run_on_tiny():
    sam = load_sam("tiny", device="cpu")
    image = np.full((90, 120, 3), (40, 80, 60), np.uint8)
    image[20:70, 30:80] = (220, 60, 40)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    masks, scores, low_res = predictor.predict(np.array([[55, 45]]), np.array([1]))
    assert masks.shape == (3, 90, 120) and scores.shape == (3,) and low_res.shape == (3, IMG_SIZE // 2, IMG_SIZE // 2)
    generator = SamAutomaticMaskGenerator(sam, points_per_side=4, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    records = generator.generate(image)
    assert records and records[0]["segmentation"].shape == (90, 120)


def test_tiny_reads_its_thresholds_and_hash_from_the_file(tiny_file):
    spec = load_sam("tiny", tiny_file, "cpu").spec
    assert (spec.pred_iou_thresh, spec.stability_score_thresh) == (0.6, 0.7)
    assert spec.sha256 == hashlib.sha256(tiny_file.read_bytes()).hexdigest()


def test_half_precision_stays_inside_the_image_encoder():
    whole, half = load_sam("tiny", device="cpu"), load_sam("tiny", device="cpu", half=True)
    assert half.spec.half and not whole.spec.half
    kinds = {name.split(".")[0]: value.dtype for name, value in half.named_parameters()}
    assert kinds == {"image_encoder": torch.float16, "prompt_encoder": torch.float32, "mask_decoder": torch.float32}
    picture = torch.randn(1, 3, IMG_SIZE, IMG_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = whole.image_encoder(picture), half.image_encoder(picture)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_thresholds_that_are_no_numbers(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(build_tiny_sam().state_dict(), path, metadata={"pred_iou_thresh": "high"})
    with pytest.raises(ValueError, match="pred_iou_thresh = 'high'"):
        load_sam("tiny", path, "cpu")


def test_a_sam_of_the_callers_own():
    spec = spec_of(build_tiny_sam())
    assert (spec.name, spec.pred_iou_thresh, spec.stability_score_thresh) == ("custom", 0.88, 0.95)


def test_mobile_sam_gives_the_embedding_of_the_module_it_came_from(mobile):
    original, path = mobile
    sam = load_sam("mobile_sam", path, "cpu")
    assert sam.spec.name == "mobile_sam" and (sam.spec.pred_iou_thresh, sam.spec.stability_score_thresh) == (0.88, 0.95)
    picture = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        embedding = sam.image_encoder(picture)
        assert embedding.shape == (1, 256, 64, 64)
        assert torch.equal(embedding, original.image_encoder(picture))


def test_mobile_sam_has_the_keys_of_the_official_file(mobile):
    state = mobile[0].state_dict()
    sizes = {  # named as in MobileSAM's own TinyViT
        "image_encoder.patch_embed.seq.0.c.weight": (32, 3, 3, 3),
        "image_encoder.patch_embed.seq.2.bn.running_var": (64,),
        "image_encoder.layers.0.blocks.0.conv2.c.weight": (256, 1, 3, 3),
        "image_encoder.layers.0.downsample.conv3.c.weight": (128, 128, 1, 1),
        "image_encoder.layers.1.blocks.0.attn.attention_biases": (4, 49),
        "image_encoder.layers.2.blocks.5.attn.qkv.weight": (480, 160),
        "image_encoder.layers.3.blocks.1.mlp.fc1.weight": (1280, 320),
        "image_encoder.layers.3.blocks.0.local_conv.c.weight": (320, 1, 3, 3),
        "image_encoder.norm_head.weight": (320,),
        "image_encoder.head.weight": (1000, 320),
        "image_encoder.neck.3.weight": (256,),
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight": (256, 128),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
    }
    assert {key: tuple(state[key].shape) for key in sizes} == sizes


def test_vit_b_loads_and_is_told_from_others(tmp_path):
    original = sam_model_registry["vit_b"]()
    path = tmp_path / "sam_vit_b.pth"
    torch.save(original.state_dict(), path)
    sam = load_sam("vit_b", path, "cpu")
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in sam.state_dict().items())
    with pytest.raises(ValueError, match="holds the weights of vit_b, not of vit_h.*load_sam\\('vit_b'"):
        load_sam("vit_h", path, "cpu")
    path.unlink()


@pytest.mark.parametrize("name", list(MODELS))
def test_each_model_is_known_by_its_weights(name):
    if name == "mobile_sam":
        state = build_mobile_sam().state_dict()
    else:
        with torch.device("meta"):  # shapes without the gigabytes
            state = MODELS[name]().state_dict()
    assert identify(state) == name


def test_unknown_weights_are_not_named():
    assert identify({"head.weight": torch.zeros(2)}) is None
    assert identify({"image_encoder.patch_embed.proj.weight": torch.zeros(7, 3, 16, 16)}) is None
    assert identify({"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(7, 3, 7, 7)}) == "SAM 2"


def test_wrong_name_for_the_file(mobile, tiny_file, tmp_path):
    with pytest.raises(ValueError, match="weights of mobile_sam, not of vit_b"):
        load_sam("vit_b", mobile[1], "cpu")
    with pytest.raises(ValueError, match="weights of tiny, not of mobile_sam"):
        load_sam("mobile_sam", tiny_file, "cpu")
    save_file({"image_encoder.trunk.x": torch.zeros(1)}, tmp_path / "sam2.safetensors")
    with pytest.raises(ValueError, match="SAM 2, not of vit_b. That model is not supported"):
        load_sam("vit_b", tmp_path / "sam2.safetensors", "cpu")


def test_almost_the_right_weights(tmp_path):
    state = build_tiny_sam().state_dict()
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)
    state["extra"] = torch.zeros(1)
    del state["mask_decoder.mask_tokens.weight"]
    torch.save(state, tmp_path / "odd.pt")
    message = "lacks 1 of .*mask_tokens.* 1 others.*extra.*iou_token.*\\(1, 7\\), not \\(1, 128\\)"
    with pytest.raises(ValueError, match=message):
        load_sam("tiny", tmp_path / "odd.pt", "cpu")


def test_half_precision_wrapped_and_legacy_files(tmp_path):
    state = build_tiny_sam().state_dict()
    torch.save({"model": state}, tmp_path / "wrapped.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_file(half, tmp_path / "half")
    for name in ("wrapped.pt", "legacy.pt", "half"):
        loaded = load_sam("tiny", tmp_path / name, "cpu").state_dict()
        assert all(torch.allclose(value, state[key], atol=1e-3) for key, value in loaded.items())
        assert loaded["mask_decoder.iou_token.weight"].dtype == torch.float32


def cut(path, target):
    data = path.read_bytes()
    target.write_bytes(data[: len(data) * 2 // 3])
    return target


def test_truncated_files(mobile, tiny_file, tmp_path):
    with pytest.raises(ValueError, match="cut short"):
        load_sam("mobile_sam", cut(mobile[1], tmp_path / "mobile_sam.pt"), "cpu")
    with pytest.raises(ValueError, match="cut short"):
        load_sam("tiny", cut(tiny_file, tmp_path / "tiny.safetensors"), "cpu")
    torch.save(build_tiny_sam().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="damaged"):
        load_sam("tiny", cut(tmp_path / "old.pt", tmp_path / "old_cut.pt"), "cpu")


class RunsCode:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_does_not_run(tmp_path, zipped):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save({"weights": RunsCode(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="Python objects"):
        load_sam("vit_b", path, "cpu")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no weights here", b"<html>404: not found</html>", b"\x80\x02half"])
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
    with pytest.raises(ValueError, match="Choose one of mobile_sam, tiny"):
        load_sam("vit_x")
    with pytest.raises(ValueError, match="cannot be used here"):
        resolve_device("no such device")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="cannot be used here"):
            resolve_device("cuda")
