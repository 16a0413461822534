"""Rows of datasets: files and formats, preferences from ratings, and which rows are held out."""
