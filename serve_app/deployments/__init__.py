"""The Ray Serve deployments: handles and configuration in, load in `__init__`, delegate.

Each imports its stage in `__init__`: the process that builds the graph and the ingress load no torch.
"""
