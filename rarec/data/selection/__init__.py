"""Select training samples: denoise, diversify, and draw a share."""
