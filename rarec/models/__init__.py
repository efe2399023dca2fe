"""The method: frozen language model, slots, alignment, readout, losses, two towers; no datasets, no training loop."""

import logging
import os
import sys

# Where the package `kernels` is installed, bitsandbytes and transformers load compiled code from a hub with it. No code
# that comes from elsewhere runs here, so they do not find it. Before either of them is imported.
os.environ["USE_HUB_KERNELS"] = "NO"
sys.modules["kernels"] = None  # type: ignore[assignment]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns that `kernels` is missing
