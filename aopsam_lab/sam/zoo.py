"""The SAM models by name, each a plain `segment_anything.modeling.Sam` with its weights."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import safe_open
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor, nn

from aopsam_lab.sam.download import OFFICIAL, kept_file
from aopsam_lab.sam.mobile import build_mobile_sam
from aopsam_lab.weights import WEIGHTS

BUNDLED = {"mobile_sam": WEIGHTS / "mobile_sam.safetensors"}
DEFAULT = "mobile_sam"
_VITS = {name: sam_model_registry[name] for name in ("vit_b", "vit_l", "vit_h")}
MODELS: dict[str, Callable[[], Sam]] = {"mobile_sam": build_mobile_sam, **_VITS}
# SamAutomaticMaskGenerator's defaults, chosen for the official models.
PRED_IOU_THRESH = 0.88
STABILITY_SCORE_THRESH = 0.95


@dataclass(frozen=True)
class SamSpec:
    """Which SAM this is, and the two thresholds that its masks are filtered with."""

    name: str  # in the zoo, or "custom"
    pred_iou_thresh: float
    stability_score_thresh: float
    sha256: str  # of its weights file; "" for a Sam that is not from the zoo


def load_sam(
    name: str = DEFAULT,
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device = "auto",
    sha256: str | None = None,
) -> Sam:
    """Load a SAM for inference: in eval mode, without gradients, its `SamSpec` in `.spec`.

    Args:
        name: "mobile_sam" (bundled), "vit_b", "vit_l" or "vit_h".
        checkpoint: a file with the official one's keys, by `torch.save` or safetensors, whose
            metadata may hold `pred_iou_thresh` and `stability_score_thresh`. No code in a file is
            ever run. None: the bundled weights, or the official file in the cache folder.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...
        sha256: what the file must have; None: any. A flipped bit is noticed by nothing else.
    """
    if name not in MODELS:
        raise ValueError(f"There is no SAM called {name!r}. Choose one of {', '.join(MODELS)}.")
    device = resolve_device(device)
    if checkpoint is None:
        checkpoint = BUNDLED[name] if name in BUNDLED else official_weights(name)
    path = Path(checkpoint)
    digest = file_sha256(path)
    if sha256 not in (None, digest):
        raise ValueError(f"{path} has the sha256 {digest}, not {sha256}. Download it again.")
    state, metadata = _read_weights(path)
    found = identify(state)
    if found not in (name, None):
        advice = f"use load_sam({found!r}, ...)"
        raise ValueError(f"{path} holds the weights of {found}, not of {name}: {advice}.")
    sam = MODELS[name]()
    try:
        load_weights(sam, state)
        pred_iou = float(metadata.get("pred_iou_thresh", PRED_IOU_THRESH))
        stability = float(metadata.get("stability_score_thresh", STABILITY_SCORE_THRESH))
        if not math.isfinite(pred_iou) or not math.isfinite(stability):
            raise ValueError(f"its thresholds are {pred_iou} and {stability}")
    # of load_state_dict a line for each kind of difference, with all its keys
    except (RuntimeError, ValueError) as error:
        reason = shorten(str(error), 300, placeholder=" ...")
        raise ValueError(f"{path} does not fit {name}: {reason}") from error
    sam.spec = SamSpec(name, pred_iou, stability, digest)
    return sam.requires_grad_(False).to(device).eval()


def official_weights(name: str) -> Path:
    """The path of a file of OFFICIAL; ValueError where it is not in the cache, or another file."""
    path, command = kept_file(name), f"python -m aopsam_lab download {name}"
    if not path.exists():
        wanted = f"its weights {path.name} ({OFFICIAL[name].size / 1e6:,.0f} MB)"
        advice = f"run `{command}`, or pass the path of such a file as checkpoint"
        raise ValueError(f"{name} needs {wanted}: {advice}.")
    if file_sha256(path) != OFFICIAL[name].sha256:
        advice = f"`{command}` fetches it anew; weights of your own are passed as checkpoint"
        raise ValueError(f"{path} is not the official {path.name}: its sha256 differs. {advice}.")
    return path


def spec_of(sam: Sam) -> SamSpec:
    """The `SamSpec` of a Sam; "custom" with the generator's thresholds for one of your own."""
    return getattr(sam, "spec", SamSpec("custom", PRED_IOU_THRESH, STABILITY_SCORE_THRESH, ""))


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """A device by name; "auto": the CUDA GPU or else the CPU. ValueError where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    # torch says "absent" in all these ways
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"cannot be used here ({first_line(error)})"
        raise ValueError(f"Device {str(device)!r} {reason}. Use 'auto' or 'cpu'.") from error
    return chosen


def identify(state: dict[str, Tensor]) -> str | None:
    """The model whose weights these look like, by its image encoder; None where none is known."""
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        return "mobile_sam"
    patches = state.get("image_encoder.patch_embed.proj.weight")
    channels = 0 if patches is None else len(patches)
    return {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}.get(channels)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint by key, and its metadata (only safetensors have any)."""
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # 8 bytes of length, then JSON
    metadata: dict[str, str] = {}
    try:
        if is_safetensors:
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                metadata = file.metadata() or {}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for wrapper in ("model", "state_dict"):  # how training scripts often wrap them
                state = state.get(wrapper, state)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds more than tensors")
    except Exception as error:  # a damaged file shows itself as one of many types
        problem = f"{path} is damaged, or no checkpoint of weights alone ({first_line(error)})."
        advice = "Code in a file is never run: save the state dict alone, or download it again."
        raise ValueError(f"{problem} {advice}") from error
    return state, metadata


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors into a model; ValueError where one that must be is not of finite floats."""
    for key, own in model.state_dict().items():
        given = state.get(key)
        if given is None or not own.is_floating_point():
            continue
        if not given.is_floating_point() or not given.float().isfinite().all():
            kind = "NaN or infinite numbers" if given.is_floating_point() else f"{given.dtype}"
            raise ValueError(f"{key} holds {kind}, not finite floats")
    model.load_state_dict(state)


def first_line(error: Exception) -> str:
    """What an error says first, else its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def file_sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
