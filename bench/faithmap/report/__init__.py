"""What a board looks like: Markdown, figures, and the table at the end of a run."""
