"""Many runs of one base configuration: their definition, their states, and how they are run. Imports nothing heavy."""
