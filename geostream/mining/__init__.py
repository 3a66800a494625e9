"""Store embeddings of a split, and build neighbour graphs from them or from coordinates."""
