"""Scores of predictions against truth, comparable with those of other tools and papers."""
