"""Render cities into a folder: ``python -m sharding.simcity RAW``."""

from sharding.simcity.city import main

if __name__ == "__main__":
    main()
