"""Mining: embeddings of a split, and neighbour graphs made from them or from coordinates."""
