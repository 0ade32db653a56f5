"""A detector's net as ONNX, for runtimes without PyTorch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.onnx import symbolic_helper

from stages.lib.detector import Detector, Net
from stages.lib.targets import CODE

OPSET = 18
POINT = ("x_m", "y_m", "z_m", "intensity", "age_s")


class _OneSample(nn.Module):
    def __init__(self, net: Net):
        super().__init__()
        self.net = net

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heat, code = self.net(points, torch.zeros_like(points[:, 0], dtype=torch.int64), 1)
        return heat[0].sigmoid(), code[0]


@contextlib.contextmanager
def _plain_scatter() -> Iterator[None]:
    """scatter_reduce as one ScatterElements; the exporter's own adds branches whose shapes runtimes complain of."""
    def symbolic(g: Any, into: Any, dim: Any, *rest: Any) -> Any:
        index, rows, how, _ = rest
        reduction = {"sum": "add", "amax": "max"}[symbolic_helper._get_const(how, "s", "reduce")]
        return g.op("ScatterElements", into, index, rows, axis_i=symbolic_helper._get_const(dim, "i", "dim"),
                    reduction_s=reduction)

    torch.onnx.register_custom_op_symbolic("aten::scatter_reduce", symbolic, OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::scatter_reduce", OPSET)


def export(detector: Detector, path: Path) -> None:
    """The net as ONNX: `points` (N, 5) float32, any N >= 1 -> `heat` (classes, h, w) probabilities, `code` (10, h, w).

    How to read the outputs stands in the file's metadata; `detector.peaks` is what has to follow it.
    """
    example = torch.zeros(8, len(POINT))
    content = io.BytesIO()
    with warnings.catch_warnings(), _plain_scatter():
        warnings.simplefilter("ignore")
        torch.onnx.export(_OneSample(detector.net).eval(), (example,), content, opset_version=OPSET, dynamo=False,
                          input_names=["points"], output_names=["heat", "code"],
                          dynamic_axes={"points": {0: "num_points"}})
    model = onnx.load_model_from_string(content.getvalue())
    grid = detector.arch.grid
    onnx.helper.set_model_props(model, {
        "classes": ",".join(detector.arch.classes), "points": f"{','.join(POINT)} in the ego frame",
        "code": ",".join(f"{part}:{size}" for part, size in CODE.items()),
        "x_min_m": str(grid.x_min_m), "y_min_m": str(grid.y_min_m), "cell_m": str(grid.cell_m),
        "dataset_digest": str(detector.provenance.get("dataset_digest", ""))})
    path.write_bytes(model.SerializeToString(deterministic=True))
