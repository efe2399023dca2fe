"""accelerate launch launch/train.py --config CONFIG [--fresh] [section.field=value ...]: train every variant."""

from rarec.entry import launch

if __name__ == "__main__":
    launch("train")
