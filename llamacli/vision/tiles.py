"""Cuts a picture into square tiles, with exactly the grid, size and bytes of transformers.

In: an RGB picture of Pillow. Out: `Tiles`, uint8. The picture is scaled without distortion to fit a grid of at most `most`
tiles, padded with black at the right and the bottom, and cut row by row. If there is more than one tile, the last one is the
whole picture, scaled to one tile.

Source: transformers' `image_processing_llama4.py`. Its rounding must be reproduced: sides limited by the grid are computed in
float32, others in float64, and a side that is one pixel shorter changes most of the bytes.
"""

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class Tiles(NamedTuple):
    """`grid` and the sizes count rows first, as arrays do."""

    tiles: np.ndarray  # uint8 [n, size, size, 3], row by row; the whole picture last if the grid has more than one tile
    grid: tuple[int, int]  # rows, columns
    shown: tuple[int, int]  # height and width of the picture on the grid


@cache
def grids(most: int) -> list[tuple[int, int]]:
    """(rows, columns) of every grid of at most `most` tiles, grouped by ratio."""
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for n in range(most, 0, -1):
        for rows in range(1, n + 1):
            if n % rows == 0:
                by_ratio.setdefault(rows / (n // rows), []).append((rows, n // rows))
    return [grid for same in by_ratio.values() for grid in same]


def layout(height: int, width: int, size: int, most: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of the grid for a picture, and the height and width of the scaled picture on it.

    The grid is the smallest on which the picture is not scaled down, else the one with the least reduction. A picture is
    enlarged only until it fills one tile.
    """
    possible = grids(most)
    canvases = np.array(possible, np.float32) * np.float32(size)
    scales = (canvases / np.array([height, width], np.float32)).min(1)
    growing = scales[scales >= 1]
    chosen = growing.min() if len(growing) else scales.max()
    rows, columns = min((grid for grid, scale in zip(possible, scales, strict=True) if scale == chosen), key=math.prod)
    return (rows, columns), _fitted(height, width, _limit(height, rows * size, size), _limit(width, columns * size, size))


def _limit(side: int, canvas: int, size: int) -> int | np.float32:
    """The limit of a side's length; float32 if the canvas limits it, as in the reference."""
    wanted = max(side, size)
    return np.float32(canvas) if canvas < wanted else wanted


def _fitted(height: int, width: int, most_high: int | np.float32, most_wide: int | np.float32) -> tuple[int, int]:
    """Height and width of a picture scaled to fit, at least 1 each."""
    across, down = most_wide / width, most_high / height
    if across < down:
        found = min(math.floor(height * across), int(most_high)), int(most_wide)
    else:
        found = int(most_high), min(math.floor(width * down), int(most_wide))
    return max(found[0], 1), max(found[1], 1)


def cut(picture: "Image", size: int, most: int) -> Tiles:
    """Scale an RGB picture onto its grid and cut it into tiles of `size` pixels."""
    from PIL.Image import Resampling

    (rows, columns), (high, wide) = layout(picture.height, picture.width, size, most)
    canvas = np.zeros((rows * size, columns * size, 3), np.uint8)
    canvas[:high, :wide] = np.asarray(picture.resize((wide, high), Resampling.BILINEAR))
    tiles = canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if len(tiles) > 1:
        whole = np.asarray(picture.resize((size, size), Resampling.BILINEAR))
        tiles = np.concatenate([tiles, whole[None]])
    return Tiles(np.ascontiguousarray(tiles), (rows, columns), (high, wide))
