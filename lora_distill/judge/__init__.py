"""Judging pictures: what they show, how near they are to others, and the seconds they take."""
