"""Planning: make batches of an epoch from a neighbour graph, and reads from the batches; only ``plan`` does I/O."""
