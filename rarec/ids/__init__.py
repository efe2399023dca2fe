"""ID embeddings: import them, or train SASRec, GRU4Rec or ComiRec, and know their own ranking score. Knows no LLM."""
