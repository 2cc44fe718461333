"""What fits where and how fast: the memory, cores and disk of this machine; the placement of a model in it."""
