"""Flags, in torch's own config style: `config.strict = True`, `config.patch(strict=True)`, or the environment variable named beside each.

All of them are part of the key under which Inductor caches compiled graphs.
"""

import sys
from typing import TYPE_CHECKING

from torch.utils._config_module import Config, install_config_module

register_passes: bool = Config(default=False, env_name_default="INT8_INDUCTOR_REGISTER_PASSES")
"""Run the passes in stock Inductor, beside the user's own custom passes: `torch.compile(model)` then does what backend="int8_inductor" does."""

strict: bool = Config(default=False, env_name_default="INT8_INDUCTOR_STRICT")
"""Raise `LeftBehindError` on the first quant, dequant or quantized linear that a pass leaves as it is."""

kernel_preference: str = Config(default="auto", env_name_default="INT8_INDUCTOR_KERNEL_PREFERENCE")
"""Which kernels run a product: "auto", "triton" or "torch"; see `KernelPreference`."""

if TYPE_CHECKING:
    from torch.utils._config_typing import *  # noqa: F403

install_config_module(sys.modules[__name__])
