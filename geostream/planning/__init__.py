"""Plan an epoch: batches from a neighbour graph, and reads from the batches; only ``plan`` does I/O."""
