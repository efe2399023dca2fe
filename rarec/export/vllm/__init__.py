"""Serving by vLLM: what `rarec export --to vllm` writes, and the two files that go with it."""
