"""The engines that train: PyTorch alone or with DDP, FSDP2, DeepSpeed ZeRO."""

from rarec.training.engines.interface import Engine, Optimisation, norms

__all__ = ["Engine", "Optimisation", "norms"]
