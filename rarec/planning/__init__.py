"""What a training will take: memory a rank, bytes moved, hours. Real modules on PyTorch's meta device; no weight is read."""
