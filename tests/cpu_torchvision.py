"""Makes PyPI's torchvision, which DeepInverse imports, importable beside a CPU build of torch.

It is built for CUDA: its compiled operators do not load, and its import fails for want of two schemas.
Nothing here calls those operators.
"""

from __future__ import annotations

import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    schemas = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]
