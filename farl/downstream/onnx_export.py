"""A trained network as an ONNX file: the crop of a face in, what is read off it out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farl.downstream.heatmaps import centroids, to_pixels
from farl.downstream.network import Network
from farl.downstream.task import Task
from farl_kernels import use_backend

OUTPUTS = {"parsing": "logits", "alignment": "points", "attributes": "probabilities"}
OPSET = 18
PACKAGES = ("onnx", "onnxscript")
# Images of the example that is traced: more than one, or the batch would be taken for a constant.
TRACED = 2


class CropReader(nn.Module):
    """From crops, float [B, 3, S, S] RGB in 0..1, to the task's own values.

    Parsing: logits [B, C, S, S]. Alignment: points [B, N, 2] in pixels of the crop, pixel centres at whole numbers.
    Attributes: probabilities [B, A].
    """

    def __init__(self, task: Task, network: Network, crop: int) -> None:
        super().__init__()
        self.network, self.kind, self.crop = network, task.name, crop

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.network(images).float()
        if self.kind == "parsing":
            return F.interpolate(outputs, (self.crop, self.crop), mode="bilinear", align_corners=False)
        if self.kind == "alignment":
            return to_pixels(centroids(outputs), self.crop)
        return outputs.sigmoid()


def trace(reader: CropReader) -> torch.export.ExportedProgram:
    """The network by torch.export, for any number of images; with plain operators in the place of the fused ones."""
    example = torch.rand(TRACED, 3, reader.crop, reader.crop)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), use_backend("reference"):
        return torch.export.export(reader.eval(), (example,), dynamic_shapes=({0: batch},), strict=False)


def export_onnx(task: Task, network: Network, out: str | Path) -> Path:
    """Write "images" float32 [batch, 3, S, S] -> `OUTPUTS` as one ONNX file; fp32, any batch.

    The file's metadata hold "task" and "task_about" (JSON: crop, names of classes or attributes).

    Raises:
        ValueError: the packages of the [onnx] extra are missing. OSError: the file cannot be written.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"an ONNX file needs {' and '.join(missing)}: install farl-engine with its [onnx] extra")
    out = Path(out)
    program = trace(CropReader(task, network.float().cpu(), task.protocol.crop))
    exported = torch.onnx.export(
        program, input_names=["images"], output_names=[OUTPUTS[task.name]], opset_version=OPSET, verbose=False
    )
    assert exported is not None
    exported.model.metadata_props.update(task=task.name, task_about=json.dumps(task.about()))
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        exported.save(temporary, external_data=False)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out
