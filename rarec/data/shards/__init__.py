"""Training samples on disk (WebDataset tars with an index), their checks, and their stream in planned batches."""
