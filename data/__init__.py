"""Turns text into batches. Imports none of our other rooms; start at data/open_data.py."""
