"""RA-Rec: pre-trained ID embeddings as soft prompts in every block of a frozen language model.

```python
import rarec

run = rarec.Run("mine.yaml")
run.run()
run.metrics()

rarec.load("runs/mine/bundle").recommend([["sku-1", "sku-7"]])
```

Data flows one way through the rooms of this package; a room imports only from rooms before it:
config -> storage -> console -> distributed -> data -> ranking -> neighbours -> ids -> prompts -> models -> training
-> planning -> evaluation -> report -> bundle -> export -> stages -> serve -> cluster. `rarec.cli` is a thin shell.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rarec.version import __version__

if TYPE_CHECKING:
    from rarec.bundle.recommender import load
    from rarec.stages.run import Run

__all__ = ["Run", "__version__", "load"]
_MODULES = {"Run": "rarec.stages.run", "load": "rarec.bundle.recommender"}


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for: `import rarec` alone loads nothing heavy."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'rarec' has no attribute {name!r}")
