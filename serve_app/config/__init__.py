"""The application's settings, and the Ray Serve config file that they stand in."""
