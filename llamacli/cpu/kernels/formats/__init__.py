"""Block formats: how each GGUF tensor type is unpacked, and the dot products and tiles built on that."""
