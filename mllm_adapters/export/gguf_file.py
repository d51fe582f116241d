"""Writes GGUF files: fields, then tensors, one of them in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgll_encoder.common.errors import InvalidArgumentError

Precision = Literal["float32", "float16"]
"""Dtypes of matrices in the files; vectors and tables of positions are always float32."""

Field = str | bool | int | float | Sequence[Any]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

BYTES: Mapping[Precision, int] = {"float32": 4, "float16": 2}
"""Bytes per value."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: Its name there.
        shape: Its shape, outermost dimension first.
        read: Returns its values.
        precise: Whether it is float32 in every file; vectors are.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    precise: bool = False

    def dtype(self, precision: Precision) -> Precision:
        """Return its dtype in a file of this precision."""
        return "float32" if self.precise or len(self.shape) == 1 else precision

    def nbytes(self, precision: Precision) -> int:
        """Return its size in a file of this precision."""
        return prod(self.shape) * BYTES[self.dtype(precision)]


@dataclass(frozen=True)
class GGUFFile:
    """The contents of a GGUF file.

    Attributes:
        architecture: Its ``general.architecture``.
        fields: Its other fields, in order.
        tensors: Its tensors, in order.
    """

    architecture: str
    fields: Mapping[str, Field]
    tensors: tuple[GGUFTensor, ...]

    def nbytes(self, precision: Precision) -> int:
        """Return the size of the tensors."""
        return sum(tensor.nbytes(precision) for tensor in self.tensors)

    def write(self, path: Path, precision: Precision, progress: Callable[[int], None]) -> None:
        """Write the file.

        Args:
            path: File to write.
            precision: Dtype of matrices.
            progress: Called with the number of bytes written, tensor by tensor.

        Raises:
            InvalidArgumentError: a value is too large for ``precision``.
        """
        from gguf import GGUFValueType, GGUFWriter, LlamaFileType

        kinds = {
            str: GGUFValueType.STRING, bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32,
            float: GGUFValueType.FLOAT32,
        }  # fmt: skip
        writer = GGUFWriter(path, self.architecture)
        types = {"float32": LlamaFileType.ALL_F32, "float16": LlamaFileType.MOSTLY_F16}
        writer.add_file_type(types[precision])
        for key, value in self.fields.items():
            writer.add_key_value(key, value, kinds.get(type(value), GGUFValueType.ARRAY))
        for tensor in self.tensors:
            dtype = np.dtype(tensor.dtype(precision))
            writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.nbytes(precision))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in self.tensors:
            writer.write_tensor_data(_values(tensor, precision))
            progress(tensor.nbytes(precision))
        writer.close()


def _values(tensor: GGUFTensor, precision: Precision) -> NDArray[Any]:
    values = tensor.read()
    stored = values.to(_DTYPES[tensor.dtype(precision)])
    if bool((torch.isfinite(values) & ~torch.isfinite(stored)).any()):
        raise InvalidArgumentError(
            f"{tensor.name} has a value of {float(values.abs().max()):.3g}, more than float16 can hold: use "
            "`precision=float32`"
        )
    return stored.contiguous().numpy()
