"""The stages that `serve_app.demo.training.train` runs."""
