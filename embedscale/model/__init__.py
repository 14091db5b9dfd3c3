"""A decoder as an encoder of texts: backbone, packing, attention, methods, parallel training."""
