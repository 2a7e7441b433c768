"""The stages that `serve_app.demo.train` runs."""
