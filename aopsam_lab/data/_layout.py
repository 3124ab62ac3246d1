"""The records that describe a scene, between drawing (_draw.py) and rendering (_render.py).

Lengths are in units of the picture's side, y points down, angles are in radians, colours are linear-light albedos.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = ("ellipse", "superellipse", "blob", "ring", "lathe", "polygon", "branch", "crescent", "box", "leaf")
PATTERNS = ("plain", "stripes", "checker", "clouds", "veins", "dots", "gradient", "patches", "plaid", "rings")
N_FIELDS = 32  # noise fields in the atlas, see _textures.py
N_ARGS = 20  # shape arguments per object

TEXTURE = np.dtype([
    ("pattern", "i4"), ("frequency", "f4"), ("angle", "f4"), ("field", "i4"), ("offset", "f4", (2,)),
    ("grain_size", "f4"), ("warp", "f4"), ("sharpness", "f4"), ("mottle", "f4"), ("grain", "f4"),
    ("colours", "f4", (3, 3)),
])
OBJECT = np.dtype([
    ("x", "f4"), ("y", "f4"), ("radius", "f4"), ("aspect", "f4"), ("angle", "f4"), ("reach", "f4"),  # reach: in radii
    ("shape", "i4"), ("args", "f4", (N_ARGS,)), ("rim", "f4"), ("bulge", "f4"), ("bump", "f4"),
    ("gloss", "f4"), ("gloss_power", "f4"), ("upright", "i4"), ("foot", "f4"),  # foot: below the centre, in radii
    ("shadow", "f4"), ("shadow_shift", "f4"), ("shadow_soft", "f4"), ("texture", TEXTURE),
])
PART = np.dtype([
    ("owner", "i4"), ("rank", "i4"), ("form", "i4"), ("x", "f4"), ("y", "f4"), ("a", "f4"), ("b", "f4"),
    ("angle", "f4"), ("power", "f4"), ("hollow", "i4"), ("texture", TEXTURE),
])
PART_FORMS = ("superellipse", "band", "ring")
REGION = np.dtype([
    ("normal", "f4", (2,)), ("offset", "f4"), ("width", "f4"), ("recede", "f4"), ("horizon", "f4"), ("shade", "f4"),
    ("texture", TEXTURE),
])
FRAME = np.dtype([
    ("light", "f4", (3,)), ("ambient", "f4"), ("falloff", "f4"), ("dapple", "f4"), ("dapple_field", "i4"),
    ("dapple_offset", "f4", (2,)), ("exposure", "f4"), ("contrast", "f4"), ("white", "f4", (3,)),
    ("vignette", "f4"), ("blur", "f4"), ("noise", "f4"),
])


@dataclass(frozen=True)
class SceneParams:
    """One scene. objects are in painting order; parts refer to them by `owner`; the first region fills the picture."""

    seed: int
    frame: np.ndarray
    regions: np.ndarray
    objects: np.ndarray
    parts: np.ndarray
