"""Cut the tiles of a region from imagery: a grid of overlapping tiles, and the sources that their pixels come from."""
