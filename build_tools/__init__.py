"""What setup.py is made of. Not part of the package."""
