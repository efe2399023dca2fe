"""Item vectors from pictures and texts, by models of other makers, as files that a source imports."""
