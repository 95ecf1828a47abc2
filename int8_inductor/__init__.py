"""INT8 linears for torch.compile: quantize a model, compile it with backend="int8_inductor", and read what was done with `explain`."""

from __future__ import annotations

from ._compat import check_torch_version

check_torch_version()

from . import config, ops  # noqa: E402
from . import lowering as lowering  # noqa: E402 - registers the lowerings
from .backend import install_in_stock_inductor  # noqa: E402
from .block_linear import Int8BlockLinear  # noqa: E402
from .calibrate import calibrate  # noqa: E402
from .experts import lowering as _experts_lowering  # noqa: E402, F401 - registers the lowerings
from .experts.module import QuantizedExperts  # noqa: E402
from .experts.quantize import (  # noqa: E402
    Int4WeightOnlyExpertsConfig,
    Int8DynamicActivationInt4ExpertsConfig,
    Int8DynamicActivationInt8ExpertsConfig,
)
from .explain import LeftBehindError, Report, explain  # noqa: E402
from .granularity import MappingType, PerBlock, PerGroup, PerRow, PerTensor  # noqa: E402
from .kernels import KernelPreference, KernelPreferenceError  # noqa: E402
from .linear import Int8Linear  # noqa: E402
from .observers import MinMaxObserver, MSEObserver, Observer, PercentileObserver  # noqa: E402
from .quantize import (  # noqa: E402
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from .smooth_quant import smooth_quant  # noqa: E402
from .weight_linear import Int4Linear, Int8WeightOnlyLinear  # noqa: E402

__all__ = [
    "Int4Linear",
    "Int4WeightOnlyConfig",
    "Int4WeightOnlyExpertsConfig",
    "Int8BlockLinear",
    "Int8DynamicActivationInt4ExpertsConfig",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt8ExpertsConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8Linear",
    "Int8StaticActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "Int8WeightOnlyLinear",
    "KernelPreference",
    "KernelPreferenceError",
    "LeftBehindError",
    "MSEObserver",
    "MappingType",
    "MinMaxObserver",
    "Observer",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PercentileObserver",
    "QuantizedExperts",
    "Report",
    "calibrate",
    "config",
    "explain",
    "ops",
    "quantize_",
    "smooth_quant",
]
__version__ = "0.1.0"

install_in_stock_inductor()
