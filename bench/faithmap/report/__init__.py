"""What a board looks like: Markdown, figures, and the table at the end of a run."""

from faithmap.report._format import file_stem

__all__ = ["file_stem"]
