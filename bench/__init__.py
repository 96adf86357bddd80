"""Measurements of vmmback as ratios against a stated rival in the same run: `./dev bench`."""
