"""Many runs of one base configuration: what they are, how far each is, and who runs them. Loads nothing heavy."""

from rarec.sweep.expand import Sweep, SweepRun, load_sweep
from rarec.sweep.state import first_to_do, state_of

__all__ = ["Sweep", "SweepRun", "first_to_do", "load_sweep", "state_of"]
