"""Pictures: bytes to tiles, tiles to rows of features, features to segments of a prompt.

Llama 4's vision tower reads square tiles. A picture is scaled onto a grid of tiles (tiles.py), the tower turns each tile into
some rows (tower.py), and these stand in the prompt where the chat template wrote `<|image|>` (sight.py). Pillow is imported
only when there is a picture.
"""
