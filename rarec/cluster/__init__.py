"""Many runs of one base configuration: their definition, their states, and how they are run. Imports nothing heavy."""

from rarec.cluster.definition import Sweep, SweepRun, first_to_do, load_sweep, state_of

__all__ = ["Sweep", "SweepRun", "first_to_do", "load_sweep", "state_of"]
