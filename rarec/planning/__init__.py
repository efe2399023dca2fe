"""What a training will take on each rank: memory, traffic, hours; told by modules on the meta device alone."""
