"""The tools below engines and models; each file has one subject."""

__version__ = "0.2.0"
