"""accelerate launch launch/recommend.py BUNDLE --all --log LOG --out FILE: `rarec recommend` on every rank."""

import sys

from rarec.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "recommend")
    main()
