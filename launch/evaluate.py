"""accelerate launch launch/evaluate.py --config CONFIG [--fresh] [section.field=value ...]: rank the full catalogue."""

from rarec.launch import start

if __name__ == "__main__":
    start("evaluate")
