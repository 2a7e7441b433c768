"""Capacity on paper: how many replicas a load needs, by simulation with the service's own scheduler.

`profile` holds how long passes take on a machine, `workload` what is asked, `simulate` plays the one against the other
on a virtual clock, `plan` searches the number of replicas. `measure` makes a profile of this machine.
"""
