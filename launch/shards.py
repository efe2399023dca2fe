"""accelerate launch launch/shards.py --config CONFIG [--fresh] [section.field=value ...]: text-only states and shards."""

from rarec.launch import start

if __name__ == "__main__":
    start("shards")
