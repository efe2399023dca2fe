"""accelerate launch launch/ids.py --config CONFIG [--fresh] [section.field=value ...]: train the ID models."""

from rarec.entry import launch

if __name__ == "__main__":
    launch("ids")
