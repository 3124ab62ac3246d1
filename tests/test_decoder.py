import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from aopsam_lab.sam.decoder import decode_tokens, draw_masks


def modules(width: int, side: int) -> tuple[PromptEncoder, MaskDecoder]:
    torch.manual_seed(width + side)
    encoder = PromptEncoder(width, (side, side), (8 * side, 8 * side), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=4 * width, num_heads=8)
    decoder = MaskDecoder(num_multimask_outputs=3, transformer=transformer, transformer_dim=width)
    with torch.no_grad():  # away from their initial zeros and ones, so that every bias and norm counts
        for p in decoder.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return encoder.eval(), decoder.eval()


def prompts(kind: str, count: int, extent: float) -> dict:
    if kind == "boxes":
        return dict(points=None, boxes=torch.rand(count, 4) * extent, masks=None)
    k = 3 if kind == "three points" else 1
    labels = torch.randint(0, 2, (count, k)) if k > 1 else torch.ones(count, k)
    return dict(points=(torch.rand(count, k, 2) * extent, labels), boxes=None, masks=None)


@torch.no_grad()
@pytest.mark.parametrize("width, side", [(128, 32), (256, 16), (128, 64)])
@pytest.mark.parametrize("kind", ["one point", "three points", "boxes"])
def test_same_logits_as_the_stock_decoder(width, side, kind):
    encoder, decoder = modules(width, side)
    embedding = torch.randn(1, width, side, side)
    sparse, dense = encoder(**prompts(kind, 5, 8 * side))
    for multimask, masks in ((True, slice(1, None)), (False, slice(0, 1))):
        logits, iou = decoder(embedding, encoder.get_dense_pe(), sparse, dense, multimask)
        decoded = decode_tokens(decoder, embedding, encoder.get_dense_pe(), sparse[None], encoder.no_mask_embed.weight[0])
        ours = draw_masks(decoder, decoded, masks)
        assert ours.shape == logits.shape == (5, 3 if multimask else 1, 4 * side, 4 * side)
        assert (ours - logits).abs().max() <= 1e-4
        assert (decoded.iou[:, masks] - iou).abs().max() <= 1e-4


@torch.no_grad()
def test_prompts_of_several_pictures_do_not_mix():
    encoder, decoder = modules(128, 16)
    embedding, dense = torch.randn(3, 128, 16, 16), encoder.no_mask_embed.weight[0]
    sparse = torch.stack([encoder(**prompts("one point", 4, 128))[0] for _ in range(3)])
    together = draw_masks(decoder, decode_tokens(decoder, embedding, encoder.get_dense_pe(), sparse, dense), slice(None))
    for i in range(3):
        alone = decode_tokens(decoder, embedding[i : i + 1], encoder.get_dense_pe(), sparse[i : i + 1], dense)
        assert (draw_masks(decoder, alone, slice(None)) - together[4 * i : 4 * i + 4]).abs().max() <= 1e-4


def test_gradients_flow_to_every_weight():
    encoder, decoder = modules(128, 8)
    sparse, _ = encoder(**prompts("one point", 3, 64))
    embedding = torch.randn(1, 128, 8, 8)
    decoded = decode_tokens(decoder, embedding, encoder.get_dense_pe(), sparse[None], encoder.no_mask_embed.weight[0])
    (draw_masks(decoder, decoded, slice(None)).square().mean() + decoded.iou.square().mean()).backward()
    # a key bias shifts all scores of a softmax alike: its gradient is zero, and here it is not read at all
    silent = {name for name, p in decoder.named_parameters() if p.grad is None}
    assert all(name.endswith("token_to_image.k_proj.bias") for name in silent)
