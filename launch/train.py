"""accelerate launch launch/train.py --config CONFIG [--fresh] [section.field=value ...]: train every variant."""

from rarec.launch import start

if __name__ == "__main__":
    start("train")
