"""Which training samples are kept: denoise, diversify, share."""
