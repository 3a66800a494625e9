"""Answer where a photo was taken: an index of tile vectors on the store, a search in it, and a calibrated "sure"."""
