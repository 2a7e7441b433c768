"""Azure Machine Learning's online endpoint."""
