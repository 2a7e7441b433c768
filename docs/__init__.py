"""The documents, and what makes two of them from the code."""
