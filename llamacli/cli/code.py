"""Blocks of code in an answer: what `run -x` writes and `/copy code` copies.

In: Markdown. Out: the texts of its fenced blocks, including those in lists and quotations.
"""


def code_blocks(text: str) -> list[str]:
    """The fenced blocks of code in order, without their fences; one that is not closed goes to the end of what holds it."""
    from markdown_it import MarkdownIt  # late: most answers are shown as they are

    return [token.content for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]
