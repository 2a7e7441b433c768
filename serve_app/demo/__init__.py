"""The embedded checkpoints: a miniature SDXL trained on coloured shapes (`base`, `refiner`) and all that made it.

`tiny` writes random-weight ones, for tests. Importing this package loads nothing heavy, and neither does `grammar`.
"""
