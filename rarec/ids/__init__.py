"""ID embeddings: import them, or train SASRec, GRU4Rec or ComiRec, and rank with them. Knows no LLM."""

from rarec.ids.make import make_source, source_identity
from rarec.ids.source import Source, open_source

__all__ = ["Source", "make_source", "open_source", "source_identity"]
