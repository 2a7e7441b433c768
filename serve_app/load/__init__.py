"""`sdxl-serve bench`: loads any running service over HTTP and measures it. Loads no torch and no Ray."""
