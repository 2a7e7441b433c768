"""Picture files and what they carry inside. NumPy and Pillow."""
