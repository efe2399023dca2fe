"""The method: frozen language model, slots, alignment, readout, losses, two towers; no datasets, no training loop."""

import logging
import os
import sys

# With the package `kernels`, bitsandbytes and transformers load compiled code from a hub. No code from elsewhere runs
# here, so it is hidden from them, before either is imported.
os.environ["USE_HUB_KERNELS"] = "NO"
sys.modules["kernels"] = None  # type: ignore[assignment]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns that `kernels` is missing
