"""EfficientNet-Lite0 in the tiny SAM's encoder, and the file that its weights come from."""

import pytest
import torch
import torch.nn.functional as F

from aopsam_lab.sam.efficientnet import BLOCKS, MEAN, STD, EfficientNetLite0
from aopsam_lab.sam.tiny import IMG_SIZE, PIXEL_MEAN, PIXEL_STD, build_tiny_sam
from aopsam_lab.training import tiny_sam as training
from aopsam_lab.training.backbone import installed_file, load_backbone

MEAN_IN, STD_IN = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)


def in_the_files_own_terms(weights, pixels):
    """Convolution, BatchNorm, ReLU6 one after the other, sides padded as TensorFlow does: what is added last goes right and below."""

    def conv(x, name, norm, stride=1, groups=1):
        kernel = weights[f"{name}.weight"]
        total = max(0, kernel.shape[-1] - stride)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        x = F.conv2d(x, kernel, stride=stride, groups=groups)
        mean, var, gain, bias = (weights[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gain, bias, eps=1e-3)

    x, outputs = F.relu6(conv((pixels - MEAN) / STD, "_conv_stem", "_bn0", 2)), []
    for i, (ratio, _, stride, _) in enumerate(BLOCKS):
        y, block = x, f"_blocks.{i}."
        if ratio > 1:
            y = F.relu6(conv(y, block + "_expand_conv", block + "_bn0"))
        y = F.relu6(conv(y, block + "_depthwise_conv", block + "_bn1", stride, y.shape[1]))
        y = conv(y, block + "_project_conv", block + "_bn2")
        x = x + y if y.shape == x.shape else y
        outputs.append(x)
    return outputs[4], outputs[10]


def test_the_packages_weights_give_the_same_features_folded():
    torch.manual_seed(0)
    backbone = EfficientNetLite0(MEAN_IN, STD_IN)
    load_backbone(backbone, installed_file())
    pixels = F.interpolate(torch.rand(2, 3, 12, 12) * 255, (96, 64), mode="bicubic").clamp(0, 255)
    normalised = (pixels - MEAN_IN.view(3, 1, 1)) / STD_IN.view(3, 1, 1)
    with torch.no_grad():
        found = backbone(normalised)
        wanted = in_the_files_own_terms(torch.load(installed_file(), weights_only=True), pixels)
    assert [tuple(x.shape) for x in found] == [(2, 40, 12, 8), (2, 112, 6, 4)]
    for x, true in zip(found, wanted):
        assert x.std() > 0.5 and (x - true).abs().max() < 1e-3 * true.abs().max()


def test_another_networks_file_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold EfficientNet-Lite0"):
        load_backbone(EfficientNetLite0(MEAN_IN, STD_IN), tmp_path / "other.pth")


def test_what_joins_the_backbone_starts_at_nothing_and_learns_faster():
    sam = build_tiny_sam().eval()
    encoder, picture = sam.image_encoder, torch.randn(1, 3, IMG_SIZE, IMG_SIZE)
    with torch.no_grad():
        before = encoder(picture)
        for p in encoder.backbone.parameters():
            p.zero_()
        assert torch.equal(encoder(picture), before)
    encoder.backbone.requires_grad_(False)
    groups = training.make_optimizer("muon", sam, 1e-3, 0.03).param_groups
    trained = [p for group in groups for p in group["params"]]
    assert not {id(p) for p in encoder.backbone.parameters()} & {id(p) for p in trained}
    assert len(trained) == sum(p.requires_grad for p in sam.parameters())
    [joins] = [group for group in groups if group.get("rate", 1) > 1]
    assert sorted(tuple(p.shape[:2]) for p in joins["params"]) == [(128, 40), (256, 112)]


def test_a_backbone_that_is_trained_learns_slower_than_the_rest():
    sam = build_tiny_sam()
    groups = training.make_optimizer("muon", sam, 1e-3, 0.03).param_groups
    assert len([p for group in groups for p in group["params"]]) == len(list(sam.parameters()))
    [seen] = [group for group in groups if group.get("rate", 1) < 1]
    assert {id(p) for p in seen["params"]} == {id(p) for p in sam.image_encoder.backbone.parameters()}
    assert not seen.get("muon") and seen["weight_decay"] == 0
