"""accelerate launch launch/shards.py --config CONFIG [--fresh] [section.field=value ...]: text states and shards."""

from rarec.launch import start

if __name__ == "__main__":
    start("shards")
