"""The axis words and the array aliases that use them.

Axis order is the same everywhere: ``layer, model, row, col, rank``. A *layer* is one weight
matrix, a *model* one merged checkpoint.
"""

from typing import TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array: TypeAlias = jax.Array | np.ndarray

#: Merged weights of one layer in every model.
ModelStack: TypeAlias = Float[Array, "model row col"]
#: Merged weights of same-shaped layers in every model.
LayerStack: TypeAlias = Float[Array, "layer model row col"]
#: One weight matrix.
Matrix: TypeAlias = Float[Array, "row col"]
#: Ranks of every model's update.
Ranks: TypeAlias = Int[Array, "*layer model"]
#: Status codes.
Codes: TypeAlias = Int[Array, "*layer"]
#: One number a layer.
PerLayer: TypeAlias = Float[Array, "*layer"]
#: One yes or no a layer.
Flags: TypeAlias = Bool[Array, "*layer"]

#: Names of the storage dtypes jdetune reads.
STORAGE_DTYPES = ("float32", "float16", "bfloat16")
