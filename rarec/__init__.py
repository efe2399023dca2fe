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

from typing import TYPE_CHECKING, Any

from rarec.version import __version__

if TYPE_CHECKING:
    from rarec.bundle.recommender import load
    from rarec.stages.run import Run

__all__ = ["Run", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for: `import rarec` alone loads nothing heavy."""
    if name == "Run":
        from rarec.stages.run import Run

        return Run
    if name == "load":
        from rarec.bundle.recommender import load

        return load
    raise AttributeError(f"module 'rarec' has no attribute {name!r}")
