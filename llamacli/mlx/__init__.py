"""Layers on a GPU through MLX: Metal or CUDA; on a machine with neither, MLX's CPU build. Imported only when asked for."""
