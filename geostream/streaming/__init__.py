"""Carry out an epoch plan: read its members from the store, decode them, and hand over batches of tensors."""
