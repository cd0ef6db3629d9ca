"""What to annotate next, and what was annotated."""
