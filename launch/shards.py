"""accelerate launch launch/shards.py --config CONFIG [--fresh] [section.field=value ...]: text states and shards."""

from rarec.entry import launch

if __name__ == "__main__":
    launch("shards")
