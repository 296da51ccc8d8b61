"""Dtypes of tensors in weight files, under the names that safetensors gives them ("BF16")."""

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
"""Tag -> NumPy dtype, for all that the safetensors library reads into NumPy.

In the library's order: it sorts the tensors of a file by dtype, the last of these first, then by name.
"""
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
