"""The SAM models by name, each a plain `segment_anything.modeling.Sam` with its weights."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

from aopsam_lab.sam.download import OFFICIAL, ask_to_download, command, download, kept_file
from aopsam_lab.sam.mobile import build_mobile_sam
from aopsam_lab.weights import WEIGHTS

BUNDLED = {"mobile_sam": WEIGHTS / "mobile_sam.safetensors"}
DEFAULT = "mobile_sam"
MODELS: dict[str, Callable[[], Sam]] = {
    "mobile_sam": build_mobile_sam,
    "vit_b": sam_model_registry["vit_b"],
    "vit_l": sam_model_registry["vit_l"],
    "vit_h": sam_model_registry["vit_h"],
}
# SamAutomaticMaskGenerator's defaults, chosen for the official models.
PRED_IOU_THRESH = 0.88
STABILITY_SCORE_THRESH = 0.95
# what reading a damaged file raises
DAMAGED = (
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    AttributeError,
)


@dataclass(frozen=True)
class SamSpec:
    """Which SAM this is, and the two thresholds that its masks are filtered with.

    Args:
        name: its name in the zoo, or "custom".
        pred_iou_thresh, stability_score_thresh: as SamAutomaticMaskGenerator.
        sha256: of its weights file; "" for a Sam that is not from the zoo.
    """

    name: str
    pred_iou_thresh: float
    stability_score_thresh: float
    sha256: str


def load_sam(
    name: str = DEFAULT,
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device = "auto",
    fetch: bool | None = None,
) -> Sam:
    """Load a SAM for inference: in eval mode, without gradients, its `SamSpec` in `.spec`.

    Args:
        name: "mobile_sam" (bundled), "vit_b", "vit_l" or "vit_h".
        checkpoint: a file with the official one's keys, such as a fine-tuned model, saved by
            `torch.save` or as safetensors. No code in a file is ever run. The metadata of a
            safetensors file may hold `pred_iou_thresh` and `stability_score_thresh`; else
            SamAutomaticMaskGenerator's 0.88 and 0.95 hold. None: the bundled weights, or the
            official file in the cache folder, whose sha256 is checked.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...
        fetch: whether to download an official file that is not there. None: ask a person at a
            terminal.

    Returns:
        The model on `device`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: an unknown name, a model without its file, or a file that is damaged, holds more
            than weights, or belongs to another model (named where it can be told).
    """
    if name not in MODELS:
        raise ValueError(f"There is no SAM called {name!r}. Choose one of {', '.join(MODELS)}.")
    device = resolve_device(device)
    official = checkpoint is None and name not in BUNDLED
    if official:
        checkpoint = official_weights(name, fetch)
    path = Path(BUNDLED[name] if checkpoint is None else checkpoint)
    state, metadata = _read_weights(path)
    found = identify(state)
    if found != name and found is not None:
        advice = "That model is not supported"
        if found in MODELS:
            advice = f"Load it with load_sam({found!r}, ...)"
        raise ValueError(
            f"{path} holds the weights of {found}, not of {name}. {advice}, or pass {name}'s own "
            "file."
        )
    sam = MODELS[name]()
    misfit = _misfit(sam.state_dict(), state)
    if misfit:
        wanted = f"a file with the keys of the bundled {name}, or none for the bundled weights"
        if name in OFFICIAL:
            wanted = f"the official {OFFICIAL[name].name} or one with its keys"
        raise ValueError(f"{path} does not fit {name}: {misfit}. Pass {wanted}.")
    sam.load_state_dict(state)
    sam.spec = SamSpec(
        name,
        _threshold(path, metadata, "pred_iou_thresh", PRED_IOU_THRESH),
        _threshold(path, metadata, "stability_score_thresh", STABILITY_SCORE_THRESH),
        OFFICIAL[name].sha256 if official else file_sha256(path),
    )
    return sam.requires_grad_(False).to(device).eval()


def official_weights(name: str, fetch: bool | None = None) -> Path:
    """The official file of a model in the cache folder.

    Args:
        name: a key of OFFICIAL.
        fetch: as `load_sam`.

    Raises:
        ValueError: it is not there and is not fetched, or its sha256 is not the official one; and
            what `download` raises.
    """
    path = kept_file(name)
    if path.exists():
        if file_sha256(path) != OFFICIAL[name].sha256:
            raise ValueError(
                f"{path} is not the official {path.name}, or no longer: its sha256 differs. "
                f"`{command(name)}` fetches it anew; weights of your own are passed as checkpoint."
            )
        return path
    if fetch or (fetch is None and ask_to_download(name)):
        return download(name)
    raise ValueError(
        f"{name} needs its weights {path.name} ({OFFICIAL[name].size / 1e6:,.0f} MB): "
        f"run `{command(name)}`, or pass the path of such a file as checkpoint."
    )


def spec_of(sam: Sam) -> SamSpec:
    """The `SamSpec` of a Sam; "custom" with the generator's thresholds for one of your own."""
    return getattr(sam, "spec", SamSpec("custom", PRED_IOU_THRESH, STABILITY_SCORE_THRESH, ""))


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """A device by name; "auto" is the CUDA GPU if there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    # torch says "absent" in all these ways
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Device {str(device)!r} cannot be used here ({reason}). Use 'auto' or 'cpu'."
        ) from error
    return chosen


def identify(state: dict[str, Tensor]) -> str | None:
    """The model whose weights these look like, by its image encoder; None where none is known."""
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if patches is not None:
        return {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}.get(patches.shape[0])
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        return "mobile_sam"
    if any(key.startswith("image_encoder.trunk.") for key in state):
        return "SAM 2"
    return None


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint by key, and its metadata (only safetensors have any)."""
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a checkpoint.")
    with path.open("rb") as file:
        head = file.read(9)
    is_zip, is_safetensors = zipfile.is_zipfile(path), head[8:] == b"{"  # 8 bytes of length, JSON
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors" or is_safetensors:
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                metadata = file.metadata() or {}
        else:
            # memory-mapped where the format allows, so that a large model is not held twice
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        damaged = "" if is_zip else ", or is damaged"  # a whole one is refused for its content
        raise ValueError(
            f"{path} holds Python objects beside weights{damaged}. It was not loaded, as such "
            "objects can run code; save the state dict alone."
        ) from error
    except DAMAGED as error:
        reason = "is no checkpoint of torch.save or safetensors, or it is damaged"
        if head.startswith(b"PK") or is_safetensors:
            reason = f"is damaged or cut short ({path.stat().st_size} bytes)"
        raise ValueError(f"{path} {reason}. Download or copy it again.") from error
    for wrapper in ("model", "state_dict"):  # how training scripts often wrap them
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors = isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values())
    if not tensors or not state:
        raise ValueError(f"{path} is no checkpoint: it holds no dictionary of tensors.")
    return state, metadata


def _misfit(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """How weights differ from the wanted in keys and shapes; "" where they fit."""
    missing = [key for key in wanted if key not in given]
    extra = [key for key in given if key not in wanted]
    shaped = [key for key in wanted if key in given and wanted[key].shape != given[key].shape]
    parts = []
    if missing:
        parts.append(f"it lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]}")
    if extra:
        parts.append(f"it has {len(extra)} others, such as {extra[0]}")
    if shaped:
        key = shaped[0]
        shapes = f"{tuple(given[key].shape)}, not {tuple(wanted[key].shape)}"
        parts.append(f"{len(shaped)} have another shape, such as {key}: {shapes}")
    return "; ".join(parts)


def _threshold(path: Path, metadata: dict[str, str], key: str, default: float) -> float:
    text = metadata.get(key, str(default))
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise ValueError(f"{path}: its metadata has {key} = {text!r}, no number from 0 to 1.")
    return value


def file_sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
