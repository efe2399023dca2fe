"""accelerate launch launch/evaluate.py --config CONFIG [--fresh] [section.field=value ...]: rank the full catalogue."""

from rarec.entry import launch

if __name__ == "__main__":
    launch("evaluate")
