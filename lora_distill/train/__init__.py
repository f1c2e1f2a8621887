"""Training: the objectives, the loop that minimises them, and the recipes of both works."""
