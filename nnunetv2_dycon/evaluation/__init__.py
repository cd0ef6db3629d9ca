"""Scores of predictions against truth, in numbers that can be compared with other tools and papers."""
