"""Rewrite a layout's shards in the order of similarity, as the layout's next generation."""
