"""The stages of a run, one module each: they open artefacts, check that these belong together, and call the rooms."""
