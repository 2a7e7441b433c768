"""Serves the graph with faults: `python -m tests.chaos.start CONFIG PORT FOLDER`; see `faulty`."""

from serve_app.graph.environment import set_for_own_ray

if __name__ == "__main__":
    set_for_own_ray()  # before anything imports Ray
    from tests.chaos.faulty import main

    main()
