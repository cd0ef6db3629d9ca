"""Scores of predictions against truth, in numbers that other tools and papers can be laid beside."""
