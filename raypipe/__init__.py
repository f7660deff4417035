"""raypipe: from a folder of videos to a tuned video classifier, on a laptop or a Ray cluster."""

__version__ = "0.1.0"
